"""Prototypes fitted to unlabelled rows (KM-MAP), with views of the row beside the embedding, or without a balance
assumption."""

import torch

from ..functional.label_free import LabelFit, fit_balanced_prototypes, fit_prototypes, latent_view, pca_view
from .base import Batch, Method, UnlabelledRows, View, register


def fit(classes: torch.Tensor, rows: UnlabelledRows) -> LabelFit:
    return fit_prototypes(rows.embeds(), classes, rows.mean(), rows.views())


def balanced_fit(classes: torch.Tensor, rows: UnlabelledRows) -> LabelFit:
    return fit_balanced_prototypes(rows.embeds(), classes)


def _pca(batch: Batch) -> torch.Tensor:
    return pca_view(batch.x, batch.statistics().of_rows)


def _latents(batch: Batch) -> torch.Tensor:
    statistics = batch.statistics()
    return latent_view(batch.values, batch.indices, statistics.latent_mean, statistics.latent_frequency)


PCA = View(_pca, lambda num_latents, hidden_size: hidden_size)
SAE = View(_latents, lambda num_latents, hidden_size: num_latents, reads_latents=True)

register(
    Method(
        "balanced_prototypes",
        "balanced prototypes",
        "Prototypes fitted to unlabelled images that may be mostly of one label.",
        fit=balanced_fit,
        needs_rows=True,
        compared=True,
        candidate=True,
    )
)
for name, label, views, facts in (
    ("prototypes", "prototypes", (), {"compared_gated": True, "candidate": True}),
    ("prototypes+pca", "prototypes + PCA view", (PCA,), {"candidate": True}),
    (
        "prototypes+sae",
        "prototypes + SAE view",
        (SAE,),
        {"candidate": True, "controls": {"prototypes+random": "random"}},
    ),
    ("prototypes+pca+sae", "prototypes + PCA and SAE views", (PCA, SAE), {"compared": False}),
):
    beside = f", beside the embedding {label.partition(' + ')[2]}" if views else ""
    summary = f"Prototypes fitted to unlabelled images that are spread evenly over the labels{beside}."
    facts = {"compared": True, **facts}
    register(Method(name, label, summary, fit=fit, views=views, needs_rows=True, **facts))  # type: ignore[arg-type]
