"""The comparison: every method on the same cached rows and labels, against plain CLIP with the same prompts.

Only the last CLS row is steered, so nothing but the tail of the model (steer, `post_layernorm`, projection, class
matrix) is replayed: seconds for a whole grid, with the full model's results. Each table holds the controls that a gain
must beat: a prompt ensemble, centroid steering without an SAE, and distribution normalisation. Labels are used for
scoring only.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..clip.modeling import VS2CLIPForZeroShot
from ..config.schema import COUNT
from ..data.labels.lists import Names
from ..data.labels.names import clean_class_names
from ..data.labels.prompts import BUILT_IN_TEMPLATES, class_embeddings, resolve_templates
from ..data.stores.rows import Rows, RowSource, StoreRows
from ..encoders.tail import mean_embed, plain_embeds, temperature, unit_embeds
from ..files.report import EvaluationResult
from ..training.domain import measure_statistics
from ..version import __version__
from .controls import control_model
from .few_shot import FEW_SHOT, draw_shots
from .inputs import check_replayable, class_labels, named_labels, replayable_rows, with_statistics
from .methods import CLIP, Variant, check_methods, evaluation_methods, variants_of
from .metrics import Tally, per_class_table, row_figures


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFERENCE = "+reference"


@torch.no_grad()
def evaluate(
    model: VS2CLIPForZeroShot,
    rows: RowSource,
    labels: torch.Tensor | Sequence[int] | None,
    class_names: Names | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    templates: str | Path | Sequence[str | Path | Sequence[str]] = ("single", "ensemble"),
    methods: str | Sequence[str] | None = None,
    reference_rows: RowSource | None = None,
    few_shot: int | None = None,
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
        methods: which rows, by default [`evaluation_methods`]: any method of [`METHODS`] but those that need a corpus,
            with `+gate` after it or not, and the methods' controls, which are a rule of the SAE with another
            dictionary (see [`control_model`]). Plain CLIP is always there: gains are measured against it. `+gate`
            takes the model's own gate, else the SAE's default quantile (`sae.config.gate`). What the model lacks
            statistics or calibration for is left out, with a warning; so is `"centroid"` with one gamma a latent.
        reference_rows: UNLABELLED TRAINING rows, a tensor or a store, whose mean image takes the place of the
            checkpoint's in methods that are fitted to nothing else (distribution norm); `reference` of a table's row
            says which it was.
        few_shot: give so many labelled images of each class (at most half of them), drawn at random, to what people do
            with few labels (see [`FEW_SHOT`]), and measure these rows and all others on the rest.
        batch_size: rows at a time. Memory does not grow with the number of rows, but for a few numbers each.
        num_resamples, seed: of the paired bootstrap, and of the draw of labelled images.
        meta: facts to add to the result's `meta`: the checkpoint, the data set and so on.
        clean: read class names by [`clean_class_names`] before they go into prompts.
        progress: show a progress bar while prompts are encoded.

    Raises:
        ValueError, TypeError: on labels that do not match rows or class names, rows of another width or with NaN, an
            unknown method, an inner layer that is steered, or a fault in the class names or templates.
    """
    methods = evaluation_methods() if methods is None else [methods] if isinstance(methods, str) else methods
    check_methods(methods)
    check_replayable(model)
    rows = replayable_rows(model, rows, "rows")
    names, labels = named_labels(rows, labels, class_names)
    if names is None:
        raise ValueError(
            "class_names are missing, and the rows bring none: give the names of the classes, in label order."
        )
    class_names = clean_class_names(names, clean)
    every = class_labels(rows, labels, len(class_names))
    given = torch.zeros_like(every, dtype=torch.bool)
    if few_shot is not None:
        given = draw_shots(every, COUNT.read(few_shot, "few_shot"), seed)
        if not given.any():
            raise ValueError("few_shot= needs classes with two images or more: one to learn from, one to ask about.")
    kept, target = (~given).nonzero().squeeze(-1), every[~given]
    prompt_sets = _prompt_sets(templates)
    reference = None if reference_rows is None else replayable_rows(model, reference_rows, "reference_rows")

    classifiers = {
        name: class_embeddings(model.clip, tokenizer, names, chosen, progress=progress, clean=clean)
        for name, chosen in prompt_sets.items()
    }
    variants = variants_of(model, methods, reference is not None)
    dictionaries = {variant.dictionary for variant in variants} - {None}
    models = {None: model} | {name: control_model(model, str(name)) for name in dictionaries}
    takers = [variant for variant in variants if reference is not None and variant.takes_reference]
    if reference is not None and takers:
        models[_REFERENCE] = _with_mean(model, reference, batch_size)
    used = {variant: models[_REFERENCE if variant in takers else variant.dictionary] for variant in variants}
    tallies = _run(model, used, rows, kept, target, classifiers, batch_size)

    table, samples = [], []
    for name in prompt_sets:
        plain = tallies[CLIP, name].samples().predictions == target
        shots = {} if few_shot is None else _few_shot(model, rows, given, every, classifiers[name], batch_size)
        for variant in variants:
            tally = tallies[variant, name]
            samples.append(tally.samples())
            row = {"method": variant.method, "prompts": name} | row_figures(
                samples[-1], tally.right5, target, plain, num_resamples, seed
            )
            row |= variant.facts | {"seconds": round(tally.seconds, 4)}
            if variant.scores_by_labels:
                row["reference"] = "train" if variant in takers else "checkpoint"
            table.append(row)
        for method, tally in shots.items():
            samples.append(tally.samples())
            figures = row_figures(samples[-1], tally.right5, target, plain, num_resamples, seed)
            row = {"method": method, "prompts": name} | figures | {"seconds": round(tally.seconds, 4)}
            table.append(row | {"shots": few_shot, "labelled": int(given.sum())})
    facts = _meta(model, rows, class_names, prompt_sets) | {
        "n": len(target),
        "seed": seed,
        "num_resamples": num_resamples,
    }
    return EvaluationResult(
        table, facts | dict(meta or {}), per_class_table(samples, target, class_names), target, samples
    )


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


def _run(
    model: VS2CLIPForZeroShot,
    used: Mapping[Variant, VS2CLIPForZeroShot],
    rows: Rows,
    kept: torch.Tensor,
    target: torch.Tensor,
    classifiers: Mapping[str, torch.Tensor],
    batch_size: int,
) -> dict[tuple[Variant, str], Tally]:
    """One pass over the rows `kept`, whose classes are `target`. Image features do not depend on the prompts: each
    kind is computed once a batch.

    `used` has the model of each variant: `model`, or one with another dictionary or mean image."""
    tallies = {(variant, name): Tally() for variant in used for name in classifiers}
    steerers = {
        (variant.dictionary, variant.settings): own.steerer.with_(**dict(variant.settings)).for_one_call()
        for variant, own in used.items()
    }
    for steerer in steerers.values():  # once a label set, so it is not part of the time that an image takes
        if steerer.is_steering and steerer.settings.rule.fit is not None:
            for classifier in classifiers.values():
                steerer.fit_classes(classifier)
    done = 0
    for batch in rows.batches(batch_size, kept):
        batch_target = target[done : done + len(batch)]
        names = [f"row {number}" for number in kept[done : done + len(batch)].tolist()]
        done += len(batch)
        shared: dict[Any, tuple[Any, torch.Tensor, float]] = {}
        for variant in used:
            key = variant.dictionary, variant.settings
            steerer = steerers[key]
            if key not in shared:
                start = _now(model)
                output = steerer.features_from_cls(batch)
                images = unit_embeds(output.features, names.__getitem__)
                shared[key] = (output, images, _now(model) - start)
            output, images, seconds = shared[key]
            for name, classifier in classifiers.items():
                start = _now(model)
                scores = steerer.scores(output, images, classifier)
                tally = tallies[variant, name]
                tally.seconds += seconds + _now(model) - start
                tally.add(scores, batch_target, output.fvu, output.steered)
    return tallies


def _few_shot(
    model: VS2CLIPForZeroShot,
    rows: Rows,
    given: torch.Tensor,
    labels: torch.Tensor,
    classifier: torch.Tensor,
    batch_size: int,
) -> dict[str, Tally]:
    """[`FEW_SHOT`] fitted to the rows `given`, a bool mask, and asked of the others."""

    def embeds(block: torch.Tensor) -> torch.Tensor:
        return plain_embeds(model.clip, block).to(classifier.device)

    known, others = given.nonzero().squeeze(-1), (~given).nonzero().squeeze(-1)
    shown = torch.cat([embeds(block) for block in rows.batches(batch_size, known)])
    own = labels[known].to(classifier.device)
    scale = temperature(model.clip).item()
    fitted = {name: fit(shown, own, classifier, scale) for name, fit in FEW_SHOT.items()}
    tallies = {name: Tally() for name in fitted}
    for block, target in zip(rows.batches(batch_size, others), labels[others].split(batch_size), strict=True):
        query = embeds(block)
        for name, scores in fitted.items():
            start = _now(model)
            tallies[name].add(scores(query), target)
            tallies[name].seconds += _now(model) - start
    return tallies


def _with_mean(model: VS2CLIPForZeroShot, reference: Rows, batch_size: int) -> VS2CLIPForZeroShot:
    """The model with the mean image of other rows in its statistics; without any of its own, with those of these rows,
    none of them kept."""
    known = model.domain_statistics
    if known is None:
        found = measure_statistics(model.sae, reference, clip=model.clip, sketch_rows=0)
    else:
        found = dataclasses.replace(known, image_mean=mean_embed(model.clip, reference.batches(batch_size)))
    return with_statistics(model, found)


def _now(model: VS2CLIPForZeroShot) -> float:
    if model.clip.device.type == "cuda":
        torch.cuda.synchronize(model.clip.device)
    return time.perf_counter()


# What the result says of itself


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
    if isinstance(rows, StoreRows):
        made_from = rows.store.metadata
        skipped = {"skipped": len(made_from["skipped"])}
        meta["dataset"] = {"id": made_from["dataset_id"], **made_from["dataset"], **skipped}
        meta["activations_model"] = made_from["model"]
    return meta
