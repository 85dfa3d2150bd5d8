"""The comparison: every method on the same cached rows and labels, against plain CLIP with the same prompts.

Only the last CLS row is steered, so nothing but the tail of the model (steer, `post_layernorm`, projection, class matrix) is
replayed: seconds for a whole grid, with the full model's results. Each table holds the controls that a gain must beat: a
prompt ensemble, centroid steering without an SAE, and distribution normalisation. Labels are used for scoring only.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
import transformers
from torch.nn.functional import normalize
from transformers.utils import logging

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.prompts import BUILT_IN_TEMPLATES, class_embeddings, clean_class_names, resolve_templates
from ..encoders.base_model import same_fingerprint, vision_fingerprint
from ..functional.label_free import distribution_norm_scores
from ..version import __version__
from .controls import control_model
from .methods import CLIP, DISTRIBUTION_NORMS, EVALUATION_METHODS, Variant, unknown_methods, variants_of
from .report import EvaluationResult, SampleOutputs


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data.store import ActivationStore

logger = logging.get_logger(__name__)

Rows: TypeAlias = "torch.Tensor | ActivationStore"


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
    class_names: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    templates: str | Path | Sequence[str | Path | Sequence[str]] = ("single", "ensemble"),
    methods: Sequence[str] = EVALUATION_METHODS,
    reference_rows: Rows | None = None,
    batch_size: int = 1024,
    num_resamples: int = 10_000,
    seed: int = 0,
    meta: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> EvaluationResult:
    """
    Compare every method on cached CLS rows, by replaying the tail of the model on them.

    Args:
        model: the wrapper; its gamma, lambda and gate are what is evaluated. It is left as it was found.
        rows: CLS rows of the last layer `(n, hidden_size)`, before `post_layernorm`: a tensor or an activation store.
        labels: the class of each row, `(n,)`; `None` takes the store's.
        class_names: the label set, in the order of the labels; `None` takes the store's.
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
    class_names = _class_names(rows, class_names)
    target = class_labels(rows, labels, len(class_names))
    prompt_sets = _prompt_sets(templates)
    if reference_rows is not None:
        check_rows(model, reference_rows, "reference_rows")

    classifiers = {
        name: class_embeddings(model.clip, tokenizer, class_names, chosen, progress=progress)
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
        done += len(batch)
        shared: dict[Any, tuple[Any, torch.Tensor, float]] = {}
        for variant in variants:
            with models[variant.dictionary].steering(**dict(variant.settings)) as steered:
                key = variant.dictionary, variant.settings
                if key not in shared:
                    start = _now(model)
                    output = steered.image_features_from_cls(batch)
                    shared[key] = (output, _unit(output.features), _now(model) - start)
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


def _unit(features: Any) -> torch.Tensor:
    return normalize(features.float(), dim=-1)


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
            total += _unit(model.image_features_from_cls(batch).features).double().sum(0)
    return (total / len(chosen)).float(), "evaluated" if reference_rows is None else "train"


def replay_batches(model: VS2CLIPForZeroShot, rows: Rows, batch_size: int, what: str) -> Iterator[torch.Tensor]:
    """The rows block by block, refused at the first NaN or infinity; `what` is their name in the message."""
    batches = (
        rows.split(batch_size) if isinstance(rows, torch.Tensor) else rows.iter_batches(batch_size, _last_layer(model))
    )
    start = 0
    for batch in batches:
        finite = batch.isfinite().all(-1)
        if not finite.all():
            first = start + int((~finite).nonzero()[0])
            raise ValueError(f"{what} hold NaN or infinity, first in row {first}. Extract the activations again.")
        start += len(batch)
        yield batch


def _now(model: VS2CLIPForZeroShot) -> float:
    if model.clip.device.type == "cuda":
        torch.cuda.synchronize(model.clip.device)
    return time.perf_counter()


def _last_layer(model: VS2CLIPForZeroShot) -> int:
    return len(model.clip.vision_model.encoder.layers) - 1


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


# Checks


def check_replayable(model: VS2CLIPForZeroShot) -> None:
    """Refuse a model with an inner layer steered: cached rows of the last layer can't show what that does."""
    last = _last_layer(model)
    if list(model.fvu_thresholds) != [last]:
        raise ValueError(
            f"only an SAE on the last layer ({last}) can be evaluated on cached rows; this model steers layers "
            f"{sorted(model.fvu_thresholds)}. Run the whole model on the images instead."
        )


def check_rows(model: VS2CLIPForZeroShot, rows: Rows, what: str) -> None:
    """Refuse rows of another shape, layer or CLIP than this model's; `what` is their name in the message."""
    width = model.clip.visual_projection.in_features
    if isinstance(rows, torch.Tensor):
        if rows.ndim != 2:
            raise ValueError(f"{what} must be (n, {width}); they are {tuple(rows.shape)}.")
        found = rows.shape[1]
    elif hasattr(rows, "iter_batches"):
        found = rows.hidden_size
    else:
        raise TypeError(f"{what} must be a tensor (n, {width}) or an ActivationStore, not {type(rows).__name__}.")
    if found != width:
        raise ValueError(
            f"{what} have width {found}, but the CLIP of this model has hidden size {width}. Extract them with that CLIP."
        )
    if len(rows) == 0:
        raise ValueError(f"{what} are empty: there is nothing to evaluate.")
    if not isinstance(rows, torch.Tensor):
        _check_store(model, rows, what)


def _check_store(model: VS2CLIPForZeroShot, store: ActivationStore, what: str) -> None:
    last = _last_layer(model)
    if last not in store.layers:
        raise ValueError(
            f"{what}: the store {store.path} holds layers {store.layers}, but the last layer, {last}, is the one to "
            "evaluate. Extract it with layers=(-1,)."
        )
    if not same_fingerprint(store.metadata["base_model_fingerprint"], vision_fingerprint(model.clip)):
        raise ValueError(
            f"{what}: the store {store.path} was extracted with another CLIP ({store.metadata['model']['id']}) than the one "
            "of this model. Extract the activations with this one."
        )


def _class_names(rows: Rows, class_names: Sequence[str] | None) -> Sequence[str]:
    if class_names is None and not isinstance(rows, torch.Tensor):
        class_names = rows.class_names
    if class_names is None:
        raise ValueError(
            "class_names are missing, and the rows bring none: give the names of the classes, in label order."
        )
    return clean_class_names(class_names)


def class_labels(rows: Rows, labels: Any, num_classes: int) -> torch.Tensor:
    """The labels as int64 `(n,)` on the CPU, checked against rows and class names."""
    if labels is None and not isinstance(rows, torch.Tensor):
        labels = rows.labels
    if labels is None:
        raise ValueError("labels are missing, and the rows bring none: accuracy needs the true class of each row.")
    target = torch.as_tensor(labels).cpu()
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"labels must be integers, the index of each row's class, not {target.dtype}.")
    if target.shape != (len(rows),):
        raise ValueError(
            f"there are {len(rows)} rows but labels of shape {tuple(target.shape)}: one label a row is needed."
        )
    outside = ((target < 0) | (target >= num_classes)).nonzero()
    if len(outside):
        row = int(outside[0])
        hint = " (data sets mark hidden labels with -1)" if target[row] == -1 else ""
        raise ValueError(
            f"label {int(target[row])} of row {row} is out of range: {num_classes} class names allow 0 to "
            f"{num_classes - 1}{hint}."
        )
    return target.long()


__all__ = [
    "DISTRIBUTION_NORMS",
    "EVALUATION_METHODS",
    "EvaluationResult",
    "SampleOutputs",
    "check_replayable",
    "check_rows",
    "class_labels",
    "evaluate",
    "paired_bootstrap",
    "replay_batches",
    "row_figures",
]
