"""Which method to use for one's images and labels: by what unlabelled images say, and, with some labels, by a paired
test."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from textwrap import wrap
from typing import Any

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..config.sae import SAEConfig
from ..data.labels.lists import Names
from ..data.stores.rows import Rows, RowSource, checked_labels
from ..encoders.tail import is_sigmoid, softmax_temperature, unit_embeds
from ..files.json_files import write_json
from ..methods import METHODS, method_named
from ..training.domain import SKETCH_ROWS, measure_statistics
from .evidence import (
    SHOWN_EVIDENCE,
    Evidence,
    Shift,
    decide,
    embeds_of,
    evidence_text,
    gather_evidence,
    inside,
    shift_of,
)
from .inputs import are_stored, check_replayable, named_labels, replayable_rows, with_statistics
from .metrics import Gain, gain_text
from .table import WIDTH


LEAST_LABELS = 10
"""With fewer no test tells anything."""
LEAST_IMAGES = 20
"""With fewer there is nothing to tell from."""
ERROR, POWER = 0.05, 0.8
"""Of the paired test: how often it may name a method that is no better, and how often it should find one that is."""
TO_KNOW = "label 100 images, know"
_SAFE = ("none", "anchored_prototypes")


@dataclass
class Recommendation:
    """
    What to use, and why.

    Args:
        method (`str`): one of [`Steering`]'s; `"none"` is plain CLIP.
        reasons (`list[str]`): sentences.
        calibrate_first (`bool`): the images are not those of the checkpoint; the recommendation is about a checkpoint
            that is calibrated on them.
        evidence (`dict`): the numbers behind it, see [`Evidence`], and how the images differ from the checkpoint's,
            see [`Shift`].
        candidates (`list[dict]`): with labels, a row a method: `top1`, `gain` over plain CLIP in points, `gain_ci`,
            its 95 % paired bootstrap interval, `n`, `p` of the exact paired test (against plain CLIP, not corrected
            for the number of methods), and `n_needed`, with how many labels such a gain is found in 4 of 5 cases.
        by_rule (`str`): the answer without labels.
    """

    method: str
    reasons: list[str]
    calibrate_first: bool
    evidence: dict[str, Any]
    candidates: list[dict[str, Any]] = field(default_factory=list)
    by_rule: str = "none"

    def __str__(self) -> str:
        name = _name(self.method) if self.candidates else f"{_name(self.method)}; {TO_KNOW}"
        lines = [f"Recommended: {name}"]
        for reason in self.reasons:
            lines += wrap(f"- {reason}", WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
        lines += ["", "Evidence, without labels:"] if self.evidence else []
        for name in (name for name in SHOWN_EVIDENCE if name in self.evidence):
            line = f"  {evidence_text(name, self.evidence[name]):>8}  {SHOWN_EVIDENCE[name]}"
            lines += wrap(line, WIDTH, subsequent_indent=" " * 12, break_on_hyphens=False)
        if self.candidates:
            lines += ["", *_table(self.candidates)]
        return "\n".join(lines)

    def to_json(self, path: str | Path) -> Path:
        """Write it, whole or not at all."""
        return write_json(Path(path), asdict(self))


@torch.no_grad()
def recommend(
    model: VS2CLIPForZeroShot,
    rows: RowSource,
    class_embeds: torch.Tensor,
    labels: torch.Tensor | Sequence[int] | None = None,
    *,
    class_names: Names | None = None,
    methods: str | Sequence[str] | None = None,
    own_images: bool = False,
    seed: int = 0,
    batch_size: int = 1024,
) -> Recommendation:
    """
    Recommend a method for a label set and images, and say why; plain CLIP is among the answers.

    Without labels: `"anchored_prototypes"` where the images bear out what CLIP says of them, else plain CLIP, see
    [`decide`]. With labels of some of the images all methods are compared with that on these, and a paired test
    decides; it says how large a gain it would have found. Of fewer than 20 images, or one label, there is too little
    to tell.

    Args:
        model: the wrapper. It is left as it was found.
        rows: CLS rows of the last layer of your images, `(n, hidden_size)`, or a store of them. Of more than 4,096 a
            random choice is looked at.
        class_embeds: `(num_classes, projection_dim)`, see [`class_embeddings`].
        labels (*optional*): the class of each row, `(n,)`; -1 where it is not known.
        class_names (*optional*): what `class_embeds` are of, where `labels` are those of a store with class names:
            they are matched by name, see [`match_names`]. Without it they are places in `class_embeds`.
        methods (*optional*): which to compare on labelled images; by default all [`METHODS`] that are a `candidate`.
        own_images (`bool`): the checkpoint was fitted to these very images: don't ask whether they are others.
        seed: of the draws.
        batch_size: rows at a time.

    Raises:
        ValueError, TypeError: on rows of another width or with NaN, an inner layer that is steered, labels that do not
            match.
    """
    check_replayable(model)
    source = replayable_rows(model, rows, "rows")
    target = None if labels is None else _checked_labels(source, labels, class_names, len(class_embeds))
    classes = unit_embeds(class_embeds, "class {}".format).cpu()
    if len(source) < LEAST_IMAGES or len(classes) < 2:
        there_are = f"{_counted(len(source), 'image')} and {_counted(len(classes), 'label')}"
        too_little = f"{there_are} are too little to tell: give {LEAST_IMAGES} images or more, and 2 labels."
        return Recommendation("none", [too_little], False, {})
    # Only the rows that are looked at are read: a store may be larger than memory.
    drawn = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))[:SKETCH_ROWS]
    own = torch.cat([*source.batches(batch_size, drawn.sort().values)]).cpu()
    shown, shift = {}, Shift("", "", {})
    if not own_images:
        shown = inside(model, own)
        shift = shift_of(model, own, classes, shown.get("inside", 1.0), batch_size)
    trial = _trial(model, own if shift.calibrate else None, seed)
    known, evidence, by_rule, reasons = trial.domain_statistics, {}, "none", []
    if shift.why and not shift.calibrate:
        reasons = [shift.why, "So nothing that the checkpoint knows speaks for a method on these images."]
    elif is_sigmoid(model.clip):
        reasons = [
            f"A {type(model.clip).__name__} scores each label by itself: without labels nothing speaks for a method."
        ]
    elif known is not None and known.rows is not None:
        found = gather_evidence(embeds_of(model, known.rows, batch_size), classes, softmax_temperature(model.clip))
        evidence = asdict(found)
        by_rule, reasons = decide(found)
    if shift.calibrate:
        reasons.insert(0, f"{shift.why} What follows holds once it is calibrated on yours (hf-vs2 calibrate).")
    if shift.labels_only:
        reasons.append(shift.labels_only)
    method, candidates = by_rule, []
    if target is not None and (target >= 0).any():
        chosen = (target >= 0).nonzero().squeeze(-1)
        compared = list(dict.fromkeys([*candidates_of(methods, is_sigmoid(model.clip)), by_rule]))
        right = _answers(trial, compared, source.batches(batch_size, chosen), target[chosen], classes)
        candidates = _candidates(right, seed)
        method, told = weigh(by_rule, right)
        reasons += told
    return Recommendation(method, reasons, shift.calibrate, shown | shift.figures | evidence, candidates, by_rule)


def _name(method: str) -> str:
    return "plain CLIP" if method == "none" else method


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _trial(model: VS2CLIPForZeroShot, rows: torch.Tensor | None, seed: int) -> VS2CLIPForZeroShot:
    """The model with the statistics that the recommendation is about: fresh ones of the rows given, or its own."""
    if rows is None:
        return with_statistics(model, model.domain_statistics)
    return with_statistics(model, measure_statistics(model.sae, rows, clip=model.clip, seed=seed))


def apply_method(model: VS2CLIPForZeroShot, method: str, folder: Path) -> None:
    """Write a method into the checkpoint that the model was loaded from, with a gate only where it is calibrated for
    one."""
    described, _ = SAEConfig.get_config_dict(folder)
    if described["model_type"] == SAEConfig.model_type:
        model.sae.config.method = method
        model.sae.save_pretrained(folder)
        return
    chosen, now, known = method_named(method), model.steering_settings, model.domain_statistics
    by_distance = not chosen.reads_latents
    gate = None if by_distance and (known is None or not known.distance_quantiles) else now.gate
    model.set_steering(method=method, gate=gate, fvu_threshold=None if by_distance else now.fvu_threshold)
    model.save_pretrained(folder, full=described["holds_clip"])


# With labels


def _checked_labels(rows: Rows, labels: Any, class_names: Names | None, num_classes: int) -> torch.Tensor:
    theirs = class_names is None and are_stored(rows, labels)
    names, labels = named_labels(rows, labels, class_names)
    if names is not None and (theirs or class_names is not None) and len(names) != num_classes:
        raise ValueError(
            f"There are {len(names)} {'classes in the store' if theirs else 'class names'} and {num_classes} class "
            "embeddings: say with class_names= what the embeddings are of."
        )
    return checked_labels(labels, len(rows), lowest=-1, num_classes=num_classes)


def candidates_of(methods: str | Sequence[str] | None, sigmoid: bool = False) -> list[str]:
    """Plain CLIP, and the methods that are compared with it; of a model with `sigmoid` scores those that need no
    softmax."""
    usual = [name for name, method in METHODS.items() if method.candidate and not (sigmoid and method.needs_softmax)]
    methods = [methods] if isinstance(methods, str) else methods
    return ["none", *(usual if methods is None else (name for name in methods if name != "none"))]


def _answers(
    model: VS2CLIPForZeroShot,
    names: Sequence[str],
    blocks: Iterable[torch.Tensor],
    target: torch.Tensor,
    classes: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Which labelled images each method has right, bool `(n,)`."""
    plainly = {"gate": None, "fvu_threshold": None, "enabled": True}
    steerers = {name: model.steerer.with_(method=name, **plainly).for_one_call() for name in names}
    answers: dict[str, list[torch.Tensor]] = {name: [] for name in steerers}
    classes = classes.to(model.clip.device)
    for block in blocks:
        for name, steerer in steerers.items():
            scores = steerer.class_logits(steerer.features_from_cls(block), classes)
            answers[name].append(scores.argmax(-1).cpu())
    return {name: torch.cat(given) == target for name, given in answers.items()}


def _candidates(right: Mapping[str, torch.Tensor], seed: int) -> list[dict[str, Any]]:
    plain, found = right["none"], []
    for name, correct in right.items():
        one: dict[str, Any] = {"method": name, "top1": 100 * correct.double().mean().item(), "n": len(correct)}
        if name != "none":
            gain = Gain.of(correct, plain, seed=seed)
            one |= {"gain": gain.points, "gain_ci": list(gain.interval), "p": sign_test(gain.fixed, gain.broken)}
            one["n_needed"] = _needed(gain, len(right) - 1)
        found.append(one)
    return found


def sign_test(fixed: int, broken: int) -> float:
    """The exact paired test (McNemar): how likely so one-sided a split of the answers that differ, or a more one-sided
    one, is by chance."""
    differ = fixed + broken
    tail = sum(math.comb(differ, number) for number in range(min(fixed, broken) + 1))
    return min(1.0, float(2 * tail / 2**differ)) if differ < 1000 else _normal_test(fixed, broken)


def _normal_test(fixed: int, broken: int) -> float:
    distance = (abs(fixed - broken) - 1) / math.sqrt(fixed + broken)
    return min(1.0, 2 * (1 - NormalDist().cdf(distance)))


def _deviations(tests: int) -> float:
    """How many standard errors a gain has to have, to be found by one of so many tests with [`POWER`]."""
    return NormalDist().inv_cdf(1 - ERROR / 2 / tests) + NormalDist().inv_cdf(POWER)


def _needed(gain: Gain, tests: int) -> int | None:
    """Labels with which a gain like this one is found in 4 of 5 cases; its variance is `p / n`, p the share of answers
    that differ."""
    if gain.fixed == gain.broken:
        return None
    return math.ceil(_deviations(tests) ** 2 * gain.n * (gain.fixed + gain.broken) / (gain.fixed - gain.broken) ** 2)


def weigh(start: str, right: Mapping[str, torch.Tensor]) -> tuple[str, list[str]]:
    """
    The method after a comparison on labelled images, and what it says: the answer without labels, unless another
    method is surely better than it, or it is surely worse than plain CLIP.

    Args:
        start: the answer without labels.
        right: which images each method has right, bool `(n,)`; `"none"`, plain CLIP, among them.
    """
    n, others = len(right["none"]), [name for name in right if name != start]
    if n < LEAST_LABELS:
        return start, [
            f"{n} labelled images are too few to compare on; give {LEAST_LABELS} or more. The answer is that without "
            "labels."
        ]
    against = {name: Gain.of(right[name], right[start]) for name in right}
    p = {name: len(others) * sign_test(against[name].fixed, against[name].broken) for name in others}
    plain = {name: Gain.of(right[name], right["none"]) for name in right}
    better = [name for name in others if p[name] < ERROR and against[name].points > 0]
    if better:
        best = max(better, key=lambda name: against[name].points)
        told = [
            f"On {n} labelled images {_name(best)} is surely better than {_name(start)}: "
            f"{_shown(against[best], p[best])}."
        ]
        return best, told + _rivals(best, right, plain)
    if start != "none" and plain[start].points < 0 and sign_test(plain[start].fixed, plain[start].broken) < ERROR:
        return "none", [f"But on {n} labelled images it surely loses: {_shown(plain[start])}. Keep plain CLIP."]
    best = max(others, key=lambda name: against[name].points)
    differ = max(1, against[best].fixed + against[best].broken) / n
    found = 100 * _deviations(len(others)) * math.sqrt(differ / n)
    measured = "" if start == "none" else f"{_name(start)} gains {_shown(plain[start])}, and "
    return start, [
        f"On {n} labelled images {measured}no other method is surely better than {_name(start)}; the best, "
        f"{_name(best)}: {_shown(against[best], p[best])}. The test finds a difference of {found:.0f} points or more "
        f"in 4 of 5 cases; for one of 2 points it takes about {math.ceil(n * (found / 2) ** 2):,} labels."
    ]


def _rivals(best: str, right: Mapping[str, torch.Tensor], plain: Mapping[str, Gain]) -> list[str]:
    """Methods that the labels can't tell from the best, with the price of each: another draw of the same images would
    name one of them."""
    close = []
    for name in right:
        gain = Gain.of(right[name], right[best])
        if name != best and plain[name].points > 0 and sign_test(gain.fixed, gain.broken) >= ERROR:
            close.append(name)
    told = (
        [
            "These labels do not tell it from "
            f"{', '.join(f'{_name(name)} ({plain[name].points:+.1f})' for name in close)}."
        ]
        if close
        else []
    )
    if best not in _SAFE:
        told.append(
            f"The price of {best}: fitted to images mostly of one label, it lost tens of points where "
            "anchored_prototypes fall back to plain "
            "CLIP (docs/recommend.md). Take it where the images stay like these."
        )
    return told


def _shown(gain: Gain, p: float | None = None) -> str:
    beside = "" if p is None else f", p = {min(1.0, p):.2g}"
    return gain_text(gain.points, gain.interval).replace(" [", " points [") + beside


def _table(candidates: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"On {candidates[0]['n']} labelled images:",
        "| method | top-1 | gain [95 % interval] |",
        "|---|---:|---:|",
    ]
    for one in candidates:
        gain = "-" if "gain" not in one else gain_text(one["gain"], one["gain_ci"])
        lines.append(f"| {_name(one['method'])} | {one['top1']:.2f} | {gain} |")
    return lines


__all__ = [
    "Evidence",
    "Recommendation",
    "Shift",
    "apply_method",
    "candidates_of",
    "decide",
    "gather_evidence",
    "recommend",
    "sign_test",
    "weigh",
]
