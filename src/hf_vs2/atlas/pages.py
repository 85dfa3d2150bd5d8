"""The pages' data: plain lists and numbers, as the scripts in `assets/` read them, and `latents.json` for other
programs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .material import Example, Material, rows_on_pages
from .statistics import NUM_INTERVALS


CHUNK = 64
"""Latents in one file of details, which a browser loads when one of them is opened."""
IMAGES = 500
"""Numbers of images in one file of what their pages tell."""
ON_CARD = 4
"""Images on the card of a latent."""
CLASSES_SHOWN = 10
FVU_BINS = 48


def short(value: float, digits: int = 4) -> float | None:
    """A number with few digits, so that files stay small; `None` for what JSON cannot hold. What is not 1 (or 100)
    does not become it."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return value if rounded in (1, 100) else rounded


def thumbnail_path(index: int) -> str:
    """Where the thumbnail of an image of the data set lies in the folder: a thousand files a folder at most."""
    return f"thumbs/{index // 1000:04d}/{index}.jpg"


def index_page(material: Material) -> dict[str, Any]:
    """One entry a latent, as columns: what searching, sorting and the cards need."""
    statistics, words = material.statistics, material.words
    page: dict[str, Any] = {
        "class_names": material.truth.class_names,
        "words": words.names.words,
        "names": words.names.indices.tolist(),
        "scores": _rounded(words.names.scores),
        "floor": short(words.names.floor, 3),
        # Of each word the latents that a search for it finds, then their scores.
        "found": [[[latent for latent, _ in some], [short(score, 3) for _, score in some]] for some in words.of_word],
        "chunk": CHUNK,
        "count": statistics.count.tolist(),
        "share": [short(value) for value in statistics.share.tolist()],
        "mean": [short(value) for value in statistics.mean.tolist()],
        "max": [short(value) for value in statistics.high.tolist()],
        "images": [_images(material, latent, ON_CARD) for latent in range(statistics.num_latents)],
    }
    if material.truth.labels is not None:
        best = statistics.class_frequencies(material.truth.support).max(-1)
        page["class"] = best.indices.tolist()
        page["frequency"] = [short(value) for value in best.values.tolist()]
    return page


def detail_pages(material: Material) -> list[dict[str, Any]]:
    """The details of [`CHUNK`] latents each, with what is known of the images they show."""
    number = material.statistics.num_latents
    pages = []
    for start in range(0, number, CHUNK):
        latents = range(start, min(start + CHUNK, number))
        details = [_detail(material, latent) for latent in latents]
        rows = {row for latent in latents for row in rows_on_pages(material.statistics, material.spread, latent)}
        pages.append({"start": start, "latents": details, "images": _image_facts(material, rows)})
    return pages


def image_pages(material: Material) -> list[tuple[int, dict[str, Any]]]:
    """What the page of each shown image tells, [`IMAGES`] numbers of the data set in one file."""
    pages: dict[int, dict[str, Any]] = {}
    for row, facts in material.images.items():
        image = material.image_indices[row]
        code = [[latent, short(value)] for latent, value in facts.code]
        known = {"fvu": short(facts.fvu), "code": code, **_answers(material, row)}
        pages.setdefault(image // IMAGES, {})[str(image)] = known
    return sorted(pages.items())


def overview_page(material: Material) -> dict[str, Any]:
    """Everything that is not about one latent; a part without its input holds `missing`, which says why."""
    statistics, replay = material.statistics, material.replay
    silent = int((statistics.count == 0).sum())
    return {
        "facts": material.facts,
        "num_images": statistics.num_rows,
        "num_latents": statistics.num_latents,
        "silent": silent,
        "image_files": sorted({material.image_indices[row] // IMAGES for row in material.images}),
        "training": material.training,
        "fvu": _fvu(material),
        "results": material.results,
        "labels_missing": material.truth.missing,
        **({} if replay is None else _replay_parts(material)),
    }


def machine_readable(material: Material) -> list[dict[str, Any]]:
    """The `latents` of `latents.json`."""
    index, words, class_names = index_page(material), material.words, material.truth.class_names
    entries = []
    for latent in range(material.statistics.num_latents):
        detail = _detail(material, latent)
        entries.append(
            {
                "index": latent,
                "names": [{"name": word, "score": short(score)} for word, score in words.names.of(latent)],
                "named": words.names.name(latent) is not None,
                "away": [{"name": word, "score": short(score)} for word, score in words.away.of(latent)],
                "share": index["share"][latent],
                "mean": index["mean"][latent],
                "max": index["max"][latent],
                "top_images": [
                    {"row": image, "value": value, "thumbnail": thumbnail_path(image)}
                    for image, value in detail["top"]
                ],
                "classes": [
                    {"name": class_names[number], "frequency": frequency, "lift": lift}
                    for number, frequency, lift in detail.get("classes", [])
                ],
                "nearest": [{"index": other, "cosine": cosine} for other, cosine in detail["nearest"]],
                "companions": [{"index": other, "images": both} for other, both in detail["companions"]],
                "effect": [
                    {"name": class_names[number], "points": points}
                    for number, points in detail.get("effect", {}).get("classes", [])
                ],
            }
        )
    return entries


def _detail(material: Material, latent: int) -> dict[str, Any]:
    statistics = material.statistics
    indices, cosines = material.nearest
    rows = statistics.strongest.of(latent)
    values = statistics.strongest.scores[latent, : len(rows)].tolist()
    bins = material.spread.counts[latent].view(NUM_INTERVALS, -1).sum(-1).tolist()
    examples = [material.spread.examples.of(latent * NUM_INTERVALS + one) for one in range(NUM_INTERVALS)]
    words = material.words
    detail: dict[str, Any] = {
        "low": short(float(statistics.low[latent])),
        "high": short(float(statistics.high[latent])),
        "histogram": material.spread.counts[latent].tolist(),
        "intervals": [
            [number, [[material.image_indices[row], _value(material, row, latent)] for row in some]]
            for number, some in zip(bins, examples, strict=True)
        ],
        "away": [[word, short(score, 3)] for word, score in words.away.of(latent)],
        "companions": material.companions[latent],
        "nearest": [
            [other, short(cosine, 3)]
            for other, cosine in zip(indices[latent].tolist(), cosines[latent].tolist(), strict=True)
        ],
        "top": [[material.image_indices[row], short(value)] for row, value in zip(rows, values, strict=True)],
    }
    if material.truth.labels is not None:
        detail["classes"] = _classes(material, latent)
    effect = material.effects[latent]
    if effect is not None:
        classes = [[number, short(points, 3)] for number, points in effect.classes]
        detail["effect"] = {"images": effect.images, "classes": classes, "changes": effect.changes}
    return detail


def _value(material: Material, row: int, latent: int) -> float | None:
    return short(dict(material.images[row].code).get(latent, 0.0))


def _rounded(scores: torch.Tensor) -> list[list[float | None]]:
    return [[short(value, 3) for value in line] for line in scores.tolist()]


def _classes(material: Material, latent: int) -> list[list[Any]]:
    """`[class, share of its images on which the latent is active, how many times the share among all images]`, largest
    first."""
    support = material.truth.support
    frequency = material.statistics.by_class[latent].double() / support.clamp(min=1)
    share = float(material.statistics.share[latent])
    best = frequency.topk(min(CLASSES_SHOWN, len(frequency)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[number, short(value), short(value / share, 3)] for number, value in pairs if value > 0]


def _images(material: Material, latent: int, number: int) -> list[int]:
    return [material.image_indices[row] for row in material.statistics.strongest.of(latent)[:number]]


def _image_facts(material: Material, rows: set[int]) -> dict[int, dict[str, Any]]:
    return {material.image_indices[row]: _answers(material, row) for row in sorted(rows)}


def _answers(material: Material, row: int) -> dict[str, Any]:
    """`label`, and plain and steered CLIP's answers, where there are labels."""
    labels, replay = material.truth.labels, material.replay
    about: dict[str, Any] = {} if labels is None else {"label": int(labels[row])}
    if replay is not None:
        about["plain"], about["steered"] = int(replay.predictions.plain[row]), int(replay.predictions.steered[row])
    return about


def _fvu(material: Material) -> dict[str, Any]:
    """A histogram of per-sample FVU, whose last bin also counts everything beyond it, and the gate."""
    values = np.concatenate([part.numpy() for part in material.statistics.fvu]).astype(np.float64)
    values = values[~np.isnan(values)]
    with material.model.steering(enabled=True, method="vs2"):  # which the page replays
        threshold = next(reversed(material.model.fvu_thresholds.values()))
    threshold = None if threshold == math.inf else threshold  # which holds nothing back
    top = float(np.quantile(values, 0.99, method="lower"))
    limit = max(top if math.isfinite(top) else 1.0, 1.15 * (threshold or 0.0), 1e-6)
    counts, edges = np.histogram(values.clip(max=limit), bins=FVU_BINS, range=(0, limit))
    return {
        "limit": short(float(edges[-1])),
        "counts": counts.tolist(),
        "mean": short(float(values[np.isfinite(values)].mean())) if np.isfinite(values).any() else None,
        "threshold": None if threshold is None else short(threshold),
        "steered": None if threshold is None else short(float((values <= threshold).mean())),
    }


def _replay_parts(material: Material) -> dict[str, Any]:
    replay, labels = material.replay, material.truth.labels
    assert replay is not None and labels is not None
    plain, steered = replay.predictions.plain == labels, replay.predictions.steered == labels
    now = material.model.steering_settings
    return {
        "accuracy": {
            "plain": short(100 * plain.double().mean().item()),
            "steered": short(100 * steered.double().mean().item()),
            "fixed": int((~plain & steered).sum()),
            "broken": int((plain & ~steered).sum()),
            "touched": short(replay.predictions.touched.double().mean().item()),
        },
        "classes": [{**one, "plain": short(one["plain"]), "steered": short(one["steered"])} for one in replay.classes],
        "grid": {
            "gammas": replay.gammas,
            "lambdas": replay.lambdas,
            "top1": [[short(value) for value in line] for line in replay.grid],
            "plain": short(replay.grid_plain),
            "gamma": None if isinstance(now.gamma, tuple) else now.gamma,
            "lambda": now.lambda_,
        },
        "fixed": [_example(material, one) for one in replay.fixed],
        "broken": [_example(material, one) for one in replay.broken],
    }


def _example(material: Material, one: Example) -> dict[str, Any]:
    assert material.truth.labels is not None
    return {
        "image": material.image_indices[one.row],
        "label": int(material.truth.labels[one.row]),
        "old": one.old,
        "new": one.new,
        "movers": [[mover.latent, short(mover.value, 3), short(mover.push, 3)] for mover in one.movers],
    }
