"""The comparison: every method on the same cached rows and labels, against plain CLIP with the same prompts.

Only the last CLS row is steered, so nothing but the tail of the model (steer, `post_layernorm`, projection, class matrix) is
replayed: seconds for a whole grid, with the full model's results. Each table holds the controls that a gain must beat: a
prompt ensemble, centroid steering without an SAE, and distribution normalisation. Labels are used for scoring only.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.lists import Names
from ..data.names import clean_class_names
from ..data.prompts import BUILT_IN_TEMPLATES, class_embeddings, resolve_templates
from ..encoders.tail import unit_embeds
from ..functional.label_free import distribution_norm_scores
from ..version import __version__
from .controls import control_model
from .inputs import Rows, check_replayable, check_rows, class_labels, named_labels, replay_batches
from .methods import CLIP, DISTRIBUTION_NORMS, EVALUATION_METHODS, Variant, unknown_methods, variants_of
from .report import EvaluationResult, SampleOutputs


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def paired_bootstrap(
    fixed: int, broken: int, n: int, num_resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a gain in points, from the bootstrap over images that keeps each image's two results paired.

    An image changes the difference of two accuracies by -1, 0 or +1. Drawing `n` images with replacement is then exactly
    one multinomial draw of (broken, same, fixed), which makes any number of resamples cheap.
    """
    share = np.array([broken, n - fixed - broken, fixed]) / n
    draws = np.random.default_rng(seed).multinomial(n, share, size=num_resamples)
    gains = 100 * (draws[:, 2] - draws[:, 0]) / n
    low, high = np.quantile(gains, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@torch.no_grad()
def evaluate(
    model: VS2CLIPForZeroShot,
    rows: Rows,
    labels: torch.Tensor | Sequence[int] | None,
    class_names: Names | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    templates: str | Path | Sequence[str | Path | Sequence[str]] = ("single", "ensemble"),
    methods: Sequence[str] = EVALUATION_METHODS,
    reference_rows: Rows | None = None,
    batch_size: int = 1024,
    num_resamples: int = 10_000,
    seed: int = 0,
    meta: Mapping[str, Any] | None = None,
    clean: bool = True,
    progress: bool = False,
) -> EvaluationResult:
    """
    Compare every method on cached CLS rows, by replaying the tail of the model on them.

    Args:
        model: the wrapper; its gamma, lambda and gate are what is evaluated. It is left as it was found.
        rows: CLS rows of the last layer `(n, hidden_size)`, before `post_layernorm`: a tensor or an activation store.
        labels: the class of each row, `(n,)`; `None` takes the store's.
        class_names: the label set; `None` takes the store's. The labels of a store with class names are matched with
            it by name (see [`match_names`]): any order, more names than classes, or a mapping from the store's names
            to others. Other labels are places in it.
        tokenizer: the CLIP's tokenizer.
        templates: one or several prompt sets, each of them anything [`resolve_templates`] takes. A row's `prompts` is
            `"single"`, `"ensemble"` or, for any other set, `"custom"` (`"custom2"` and so on for further ones).
        methods: which rows, by default [`EVALUATION_METHODS`]: any method of [`Steering`] but `"vs2++"`, with `+gate` after it or not,
            and the controls `"vs2_random"`, `"vs2_pca"` and `"prototypes+random"`, which are a rule of the SAE with another
            dictionary (see [`control_model`]). Plain CLIP is always there: gains are measured against it. `+gate` takes the model's
            own gate, else the SAE's default quantile (`sae.config.gate`). What the model lacks statistics or calibration for is
            left out, with a warning; so is `"centroid"` with one gamma a latent.
        reference_rows: UNLABELLED TRAINING rows, a tensor or a store, for the image mean of distribution normalisation. Without
            them it is that of the checkpoint's statistics, and where there are none that of the evaluated rows, which makes that
            method transductive (it has then seen the whole test set before it classifies the first image); its rows say so in
            `reference`.
        batch_size: rows at a time. Memory does not grow with the number of rows, but for a few numbers each.
        num_resamples, seed: of the paired bootstrap.
        meta: facts to add to the result's `meta`: the checkpoint, the data set and so on.
        clean: read class names by [`clean_class_names`] before they go into prompts.
        progress: show a progress bar while prompts are encoded.

    Raises:
        ValueError, TypeError: on labels that do not match rows or class names, rows of another width or with NaN, an
            unknown method, an inner layer that is steered, or a fault in the class names or templates.
    """
    unknown = unknown_methods(methods)
    if unknown:
        raise ValueError(f"methods={unknown} are not known. Use some of {list(EVALUATION_METHODS)}.")
    check_replayable(model)
    check_rows(model, rows, "rows")
    names, labels = named_labels(rows, labels, class_names)
    if names is None:
        raise ValueError(
            "class_names are missing, and the rows bring none: give the names of the classes, in label order."
        )
    class_names = clean_class_names(names, clean)
    target = class_labels(rows, labels, len(class_names))
    prompt_sets = _prompt_sets(templates)
    if reference_rows is not None:
        check_rows(model, reference_rows, "reference_rows")

    classifiers = {
        name: class_embeddings(model.clip, tokenizer, names, chosen, progress=progress, clean=clean)
        for name, chosen in prompt_sets.items()
    }
    variants = variants_of(model, methods)
    image_mean, reference = None, ""
    if any(variant.coefficient is not None for variant in variants):
        image_mean, reference = _image_mean(model, rows, reference_rows, batch_size)
    dictionaries = {variant.dictionary for variant in variants} - {None}
    models = {None: model} | {name: control_model(model, str(name)) for name in dictionaries}
    tallies = _run(models, rows, target, variants, classifiers, image_mean, batch_size)

    table, samples = [], []
    for name in prompt_sets:
        plain = tallies[CLIP, name].samples().predictions == target
        for variant in variants:
            tally = tallies[variant, name]
            samples.append(tally.samples())
            bootstrap = partial(paired_bootstrap, num_resamples=num_resamples, seed=seed)
            row = {"method": variant.method, "prompts": name} | row_figures(
                samples[-1], tally.right5, target, plain, bootstrap
            )
            row |= variant.facts | {"seconds": round(tally.seconds, 4)}
            if variant.coefficient is not None:
                row["reference"] = reference
            elif variant.scores_by_labels:
                row["reference"] = "checkpoint"
            table.append(row)
    facts = _meta(model, rows, class_names, prompt_sets) | {"seed": seed, "num_resamples": num_resamples}
    return EvaluationResult(table, facts | dict(meta or {}), _per_class(samples, target, class_names), target, samples)


# Prompts


def _prompt_sets(templates: Any) -> dict[str, tuple[str, ...]]:
    """Name -> templates. A plain list of templates is one set, not many."""
    is_one_set = isinstance(templates, (str, Path)) or all(
        isinstance(item, str) and "{}" in item for item in templates
    )
    sets: dict[str, tuple[str, ...]] = {}
    for chosen in [templates] if is_one_set else templates:
        custom = sum(name.startswith("custom") for name in sets)
        name = str(chosen)
        if name not in BUILT_IN_TEMPLATES:
            name = f"custom{custom + 1}" if custom else "custom"
        sets[name] = resolve_templates(chosen)
    return sets


# Replaying the tail


@dataclass
class _Tally:
    """What one variant and prompt set collect batch by batch."""

    predictions: list[torch.Tensor] = field(default_factory=list)
    fvu: list[torch.Tensor] = field(default_factory=list)
    steered: list[torch.Tensor] = field(default_factory=list)
    right5: int | None = None
    seconds: float = 0.0

    def add(self, output: Any, scores: torch.Tensor, target: torch.Tensor, touched: torch.Tensor) -> None:
        self.predictions.append(scores.argmax(-1).cpu())
        self.steered.append(touched.cpu())
        if output.fvu is not None:
            self.fvu.append(output.fvu.cpu())
        if scores.shape[-1] > 5:  # among five classes or fewer the top five are always right
            hits = scores.topk(5, dim=-1).indices.cpu() == target.unsqueeze(-1)
            self.right5 = (self.right5 or 0) + int(hits.sum())

    def samples(self) -> SampleOutputs:
        fvu = torch.cat(self.fvu) if self.fvu else None
        return SampleOutputs(torch.cat(self.predictions), fvu, torch.cat(self.steered))


def _run(
    models: Mapping[str | None, VS2CLIPForZeroShot],
    rows: Rows,
    target: torch.Tensor,
    variants: list[Variant],
    classifiers: Mapping[str, torch.Tensor],
    image_mean: torch.Tensor | None,
    batch_size: int,
) -> dict[tuple[Variant, str], _Tally]:
    """One pass over the rows. Image features do not depend on the prompts: each kind is computed once a batch.

    `models` are by dictionary, `None` is the one that is evaluated."""
    tallies = {(variant, name): _Tally() for variant in variants for name in classifiers}
    text_means = {name: classifier.mean(0) for name, classifier in classifiers.items()}
    _fit_label_sets(models, variants, classifiers)
    model, done = models[None], 0
    for batch in replay_batches(model, rows, batch_size, "rows"):
        batch_target = target[done : done + len(batch)]
        names = [f"row {number}" for number in range(done, done + len(batch))]
        done += len(batch)
        shared: dict[Any, tuple[Any, torch.Tensor, float]] = {}
        for variant in variants:
            with models[variant.dictionary].steering(**dict(variant.settings)) as steered:
                key = variant.dictionary, variant.settings
                if key not in shared:
                    start = _now(model)
                    output = steered.image_features_from_cls(batch)
                    images = unit_embeds(output.features, names.__getitem__)
                    shared[key] = (output, images, _now(model) - start)
                output, images, seconds = shared[key]
                for name, classifier in classifiers.items():
                    start = _now(model)
                    if variant.scores_by_labels:
                        scores = steered.class_logits(output, classifier)
                    else:
                        scores = _scores(variant, images, classifier, image_mean, text_means[name])
                    tally = tallies[variant, name]
                    tally.seconds += seconds + _now(model) - start
                    touched = output.steered if variant.coefficient is None else torch.ones_like(output.steered)
                    tally.add(output, scores, batch_target, touched)
    return tallies


def _fit_label_sets(
    models: Mapping[str | None, VS2CLIPForZeroShot],
    variants: list[Variant],
    classifiers: Mapping[str, torch.Tensor],
) -> None:
    """Once a label set, so it is not part of the time that an image takes."""
    for variant in variants:
        if variant.scores_by_labels:
            with models[variant.dictionary].steering(**dict(variant.settings)) as model:
                for classifier in classifiers.values():
                    model.fit_classes(classifier)


def _scores(
    variant: Variant,
    images: torch.Tensor,
    classifier: torch.Tensor,
    image_mean: torch.Tensor | None,
    text_mean: torch.Tensor,
) -> torch.Tensor:
    if variant.coefficient is None or image_mean is None:
        return images @ classifier.T
    return distribution_norm_scores(
        images, classifier, image_mean, text_mean, variant.coefficient, variant.score or "dot"
    )


def _image_mean(
    model: VS2CLIPForZeroShot, rows: Rows, reference_rows: Rows | None, batch_size: int
) -> tuple[torch.Tensor, str]:
    """Mean of plain CLIP's unit image embeddings `(projection_dim,)`, and where it comes from."""
    if reference_rows is None and model.domain_statistics is not None:
        with model.steering(method="distribution_norm", gate=None, fvu_threshold=None):
            return model.image_mean().to(model.clip.device), "checkpoint"
    chosen, what = (rows, "rows") if reference_rows is None else (reference_rows, "reference_rows")
    total = torch.zeros(model.clip.visual_projection.out_features, dtype=torch.float64, device=model.clip.device)
    with model.steering(enabled=False):
        for batch in replay_batches(model, chosen, batch_size, what):
            total += unit_embeds(model.image_features_from_cls(batch).features).double().sum(0)
    return (total / len(chosen)).float(), "evaluated" if reference_rows is None else "train"


def _now(model: VS2CLIPForZeroShot) -> float:
    if model.clip.device.type == "cuda":
        torch.cuda.synchronize(model.clip.device)
    return time.perf_counter()


# Figures of a row


def row_figures(
    samples: SampleOutputs, right5: int | None, target: torch.Tensor, plain: torch.Tensor, bootstrap: Any
) -> dict[str, Any]:
    """Accuracy, gain, coverage and FVU of one row of a table, see [`EvaluationResult`].

    `right5` counts the images with their class among the top five; `plain` `(n,)` says which images plain CLIP has right;
    `bootstrap(fixed, broken, n)` gives the gain's interval, see [`paired_bootstrap`].
    """
    n, correct = len(target), samples.predictions == target
    fixed, broken = int((correct & ~plain).sum()), int((plain & ~correct).sum())
    fvu = None if samples.fvu is None else samples.fvu.double().mean().item()
    return {
        "top1": round(100 * int(correct.sum()) / n, 4),
        "top5": None if right5 is None else round(100 * right5 / n, 4),
        "gain": round(100 * (fixed - broken) / n, 4),
        "gain_ci": [round(bound, 4) for bound in bootstrap(fixed, broken, n)],
        "fixed": fixed,
        "broken": broken,
        "coverage": round(samples.steered.double().mean().item(), 6),
        # A row that sits exactly on the training mean has an infinite FVU, which JSON cannot hold.
        "mean_fvu": fvu if fvu is not None and math.isfinite(fvu) else None,
        "n": n,
    }


def _per_class(samples: list[SampleOutputs], target: torch.Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    support = torch.bincount(target, minlength=len(class_names)).tolist()
    accuracy = []
    for row in samples:
        hits = torch.bincount(target[row.predictions == target], minlength=len(class_names)).tolist()
        accuracy.append([round(100 * hit / n, 4) if n else None for hit, n in zip(hits, support, strict=True)])
    return {"class_names": list(class_names), "support": support, "accuracy": accuracy}


def _meta(
    model: VS2CLIPForZeroShot,
    rows: Rows,
    class_names: Sequence[str],
    prompt_sets: Mapping[str, tuple[str, ...]],
) -> dict[str, Any]:
    sae = model.sae.config
    gamma, edits = model.steering_settings.gamma, model.steering_settings.edits
    meta: dict[str, Any] = {
        "hf_vs2_version": __version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "base_model": model.config.base_model_name_or_path or sae.base_model_name_or_path,
        "base_model_revision": model.config.base_model_revision or sae.base_model_revision,
        "device": str(model.clip.device),
        "dtype": str(model.clip.dtype).removeprefix("torch."),
        "sae": {"num_latents": sae.num_latents, "top_k": sae.top_k, "activation": sae.activation},
        "sae_training_data": sae.training_data,
        "gamma_per_latent": list(gamma) if isinstance(gamma, tuple) else None,
        "edits": None if edits is None else edits.to_dict(),
        "templates": {name: list(chosen) for name, chosen in prompt_sets.items()},
        "num_classes": len(class_names),
        "n": len(rows),
    }
    if not isinstance(rows, torch.Tensor):
        skipped = {"skipped": len(rows.metadata["skipped"])}
        meta["dataset"] = {"id": rows.metadata["dataset_id"], **rows.metadata["dataset"], **skipped}
        meta["activations_model"] = rows.metadata["model"]
    return meta


__all__ = [
    "DISTRIBUTION_NORMS",
    "EVALUATION_METHODS",
    "EvaluationResult",
    "SampleOutputs",
    "evaluate",
    "paired_bootstrap",
    "row_figures",
]
