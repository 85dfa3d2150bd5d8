"""Which method to use for one's images and labels: from unlabelled images alone, or, with some labels, from a comparison."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..data.labels.lists import Names
from ..data.rows import Rows, RowSource
from ..encoders.tail import clip_embeds, unit_embeds
from ..files.json_files import write_json
from ..functional.label_free import balanced_mean, fit_balanced_prototypes, fit_prototypes, label_scores, norm_fit
from ..methods import METHODS
from ..training.domain import SKETCH_ROWS, measure_statistics
from .inputs import are_stored, check_replayable, named_labels, replayable_rows
from .metrics import Gain


# The rule. Put there by eye on development halves of three data sets and their shifts; what came of it is in docs/recommend.md.
LEAST_CONFIDENCE, LEAST_STABILITY, LEAST_EVENNESS, LEAST_AGREEMENT = 0.5, 0.85, 0.94, 0.7
LEAST_INSIDE, MOST_DRIFT = 0.8, 0.05
LEAST_LABELS = 10
"""With fewer, all may happen to agree, and a gain's interval closes on nothing."""
LEAST_IMAGES = 20
"""With fewer, drawing them again tells nothing of how far answers depend on which were seen."""
TO_KNOW = "label 100 images to know"
_GATE = 0.99
_SHOWN = {
    "inside": "of your images inside the checkpoint's gate by distance",
    "inside_fvu": "of your images inside its gate by FVU",
    "drift": "more confidence of plain CLIP in the checkpoint's images than in yours",
    "rows": "unlabelled images that methods are fitted to",
    "rows_per_label": "of them a label",
    "confidence": "mean probability of plain CLIP's answer",
    "evenness": "evenness of the labels (1: all alike often)",
    "largest_share": "share of the commonest label",
    "agreement": "answers of prototypes that are plain CLIP's",
    "stability": "answers that stay when the images are drawn again",
}


@dataclass(frozen=True)
class Evidence:
    """
    What unlabelled images and a label set say, without any label. Shares are 0 to 1.

    Args:
        rows (`int`), rows_per_label (`float`): unlabelled images, and how many of them there are a label.
        confidence (`float`): mean of plain CLIP's largest probability. Where it is low, CLIP does not know the labels, and what is
            fitted to its guesses is fitted to errors.
        evenness (`float`): of the labels among the images, by [`balanced_norm`]'s guesses: the exponential of their entropy over the
            number of labels. 1 when all are alike often, `1 / num_labels` when all images get one.
        largest_share (`float`): of the commonest label, by balanced prototypes, whose guesses follow an uneven set best.
        agreement (`float`): of prototypes and plain CLIP.
        stability (`float`): of balanced prototypes' guesses, when the images that they are fitted to are drawn again with
            replacement.
    """

    rows: int
    rows_per_label: float
    confidence: float
    evenness: float
    largest_share: float
    agreement: float
    stability: float


@torch.no_grad()
def gather_evidence(
    embeds: torch.Tensor, classes: torch.Tensor, scale: float, num_resamples: int = 3, seed: int = 0
) -> Evidence:
    """
    Look at unlabelled images and a label set.

    Args:
        embeds: unit image embeddings of plain CLIP, `(n, projection_dim)`.
        classes: unit class embeddings, `(num_classes, projection_dim)`.
        scale: the CLIP's temperature, `exp(logit_scale)`.
        num_resamples, seed: of the images, for the stability.
    """
    plain = embeds @ classes.T
    balanced = fit_balanced_prototypes(embeds, classes)
    guesses = label_scores(embeds, balanced).argmax(-1)
    even = label_scores(embeds, norm_fit(classes, balanced_mean(embeds, classes))).argmax(-1)
    prototypes = label_scores(embeds, fit_prototypes(embeds, classes, embeds.mean(0))).argmax(-1)
    generator = torch.Generator().manual_seed(seed)
    same = []
    for _ in range(num_resamples):
        drawn = torch.randint(len(embeds), (len(embeds),), generator=generator)
        again = label_scores(embeds, fit_balanced_prototypes(embeds[drawn], classes)).argmax(-1)
        same.append((again == guesses).double().mean().item())
    shares = even.bincount(minlength=len(classes)).double() / len(embeds)
    entropy = -torch.special.xlogy(shares, shares).sum().item()
    return Evidence(
        rows=len(embeds),
        rows_per_label=len(embeds) / len(classes),
        confidence=(scale * plain).softmax(-1).amax(-1).mean().item(),
        evenness=math.exp(entropy) / len(classes),
        largest_share=guesses.bincount().max().item() / len(embeds),
        agreement=(prototypes == plain.argmax(-1)).double().mean().item(),
        stability=sum(same) / len(same),
    )


def decide(evidence: Evidence) -> tuple[str, list[str]]:
    """The method, and why: `"none"` is plain CLIP."""
    if evidence.confidence < LEAST_CONFIDENCE:
        return "none", [
            f"CLIP is not sure of these labels: its answer gets {evidence.confidence:.0%} on average (a method needs "
            f"{LEAST_CONFIDENCE:.0%}). What is fitted to its guesses would be fitted to errors."
        ]
    if evidence.stability < LEAST_STABILITY:
        return "none", [
            f"Only {evidence.stability:.0%} of the answers stay when the unlabelled images are drawn again (a method needs "
            f"{LEAST_STABILITY:.0%}): there are too few images for these labels."
        ]
    reasons = [
        f"CLIP is sure enough of these labels (its answer gets {evidence.confidence:.0%} on average), and {evidence.stability:.0%} of the "
        "answers stay when the unlabelled images are drawn again."
    ]
    if evidence.evenness >= LEAST_EVENNESS and evidence.agreement >= LEAST_AGREEMENT:
        reasons.append(
            f"The images are spread over the labels (evenness {evidence.evenness:.2f}), and prototypes agree with plain CLIP on "
            f"{evidence.agreement:.0%}: their balance assumption is no risk."
        )
        return "prototypes", reasons
    uneven = evidence.evenness < LEAST_EVENNESS
    found = (
        f"evenness {evidence.evenness:.2f}, the commonest label about {evidence.largest_share:.0%}"
        if uneven
        else f"prototypes agree with plain CLIP on {evidence.agreement:.0%} only"
    )
    reasons.append(
        f"The images may not be spread evenly over the labels ({found}). Distribution norm and prototypes assume that they are and could do "
        "much harm; balanced prototypes do not."
    )
    return "balanced_prototypes", reasons


@dataclass
class Recommendation:
    """
    What to use, and why.

    Args:
        method (`str`): one of [`Steering`]'s; `"none"` is plain CLIP, which is the answer wherever labels do not show
            a gain.
        reasons (`list[str]`): sentences.
        calibrate_first (`bool`): the images are not those of the checkpoint; the recommendation is about a checkpoint that is
            calibrated on them.
        evidence (`dict`): the numbers behind it, see [`Evidence`], and the share of images `inside` the gates.
        candidates (`list[dict]`): with labels, a row a method: `top1`, `gain` over plain CLIP in points, `gain_ci`, its 95 % paired
            bootstrap interval, `n`, and `n_needed`, about how many labels it would take to tell such a gain from none.
        by_rule (`str`): what the label-free rule names. Its thresholds come from one stand-in encoder; on a true CLIP
            it named methods that lose (`docs/recommend.md`).
    """

    method: str
    reasons: list[str]
    calibrate_first: bool
    evidence: dict[str, Any]
    candidates: list[dict[str, Any]] = field(default_factory=list)
    by_rule: str = "none"

    def __str__(self) -> str:
        name = _name(self.method) if self.candidates else f"{_name(self.method)}; {TO_KNOW}"
        lines = [f"Recommended: {name}", *(f"- {reason}" for reason in self.reasons)]
        lines += ["", "Evidence, without labels:"] if self.evidence else []
        lines += [
            f"  {_number(name, self.evidence[name]):>8}  {what}"
            for name, what in _SHOWN.items()
            if name in self.evidence
        ]
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
    num_resamples: int = 3,
    seed: int = 0,
    batch_size: int = 1024,
) -> Recommendation:
    """
    Recommend a method for a label set and images, and say why; plain CLIP is among the answers.

    Without labels the answer is plain CLIP. What the label-free rule would name stands beside it, with reasons
    (`by_rule`): its thresholds come from one stand-in encoder, and on a true CLIP it named methods that lose, see
    `docs/recommend.md`. With labels of some of the images it compares, and names a method that surely gains on them.
    Of fewer than 20 images, or one label, there is too little to tell.

    Args:
        model: the wrapper. It is left as it was found.
        rows: CLS rows of the last layer of your images, `(n, hidden_size)`, or a store of them. Of more than 4,096 a random choice
            is looked at.
        class_embeds: `(num_classes, projection_dim)`, see [`class_embeddings`].
        labels (*optional*): the class of each row, `(n,)`; -1 where it is not known.
        class_names (*optional*): what `class_embeds` are of, where `labels` are those of a store with class names:
            they are matched by name, see [`match_names`]. Without it they are places in `class_embeds`.
        num_resamples, seed: of the draws.
        batch_size: rows at a time.

    Raises:
        ValueError, TypeError: on rows of another width or with NaN, an inner layer that is steered, labels that do not match.
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
    shown = _inside(model, own)
    drift, noise = _drift(model, own, classes, batch_size)
    shown |= {} if drift is None else {"drift": drift}
    strange = _strange(model, shown, noise)
    trial = _trial(model, own if strange else None, seed)
    known = trial.domain_statistics
    assert known is not None and known.rows is not None
    embeds = _embeds(model, known.rows, batch_size)
    evidence = gather_evidence(embeds, classes, _temperature(model), num_resamples, seed)
    by_rule, reasons = decide(evidence)
    reasons.insert(0, _without_labels(by_rule))
    if strange:
        reasons.insert(0, f"{strange} What follows holds once it is calibrated on yours (hf-vs2 calibrate).")
    method, candidates = "none", []
    if target is not None and (target >= 0).any():
        chosen = (target >= 0).nonzero().squeeze(-1)
        candidates = _compare(trial, source.batches(batch_size, chosen), target[chosen], classes, seed)
        method, told = _reconsider(by_rule, candidates)
        reasons.append(told)
    return Recommendation(method, reasons, bool(strange), shown | asdict(evidence), candidates, by_rule)


def _name(method: str) -> str:
    return "plain CLIP" if method == "none" else method


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _without_labels(by_rule: str) -> str:
    return (
        f"Without labels nothing shows a gain. The label-free rule names {_name(by_rule)}, for the reasons below; "
        "but its thresholds come from one stand-in encoder, and on OpenAI's ViT-B/32 it named a method that loses on 6 of 8 halves of data sets "
        "(docs/recommend.md)."
    )


def _inside(model: VS2CLIPForZeroShot, rows: torch.Tensor) -> dict[str, float]:
    """Share of the rows that the checkpoint's gates would let through."""
    shares = {}
    known = model.domain_statistics
    settings: dict[str, dict[str, Any]] = {}
    if known is not None and known.distance_quantiles:
        settings["inside"] = {"method": "distribution_norm", "gate": _GATE}
    levels = [float(level) for level in model.sae.config.fvu_quantiles or {}]
    if levels:
        settings["inside_fvu"] = {"method": "vs2", "gate": min(_GATE, max(levels))}
    for name, setting in settings.items():
        gated = model.steerer.with_(fvu_threshold=None, enabled=True, **setting)
        steered = gated.features_from_cls(rows).steered
        assert steered is not None
        shares[name] = steered.double().mean().item()
    return shares


def _embeds(model: VS2CLIPForZeroShot, rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    return unit_embeds(torch.cat([clip_embeds(model.clip, part).cpu() for part in rows.split(batch_size)]))


def _temperature(model: VS2CLIPForZeroShot) -> float:
    return float(model.clip.logit_scale.exp())


def _drift(
    model: VS2CLIPForZeroShot, rows: torch.Tensor, classes: torch.Tensor, batch_size: int
) -> tuple[float | None, float]:
    """By how much plain CLIP is surer of the checkpoint's images than of these, and the standard error of that. Blur and noise leave
    images inside the gates, but not CLIP as sure of them."""
    known = model.domain_statistics
    if known is None or known.rows is None:
        return None, 0.0
    sure = [
        (_temperature(model) * _embeds(model, one, batch_size) @ classes.T).softmax(-1).amax(-1).double()
        for one in (known.rows, rows)
    ]
    error = sum(float(one.var(correction=0)) / len(one) for one in sure) ** 0.5
    return float(sure[0].mean() - sure[1].mean()), error


def _strange(model: VS2CLIPForZeroShot, shown: dict[str, float], noise: float) -> str:
    """Why the checkpoint's statistics say nothing about these images; empty where they do."""
    if model.domain_statistics is None or model.domain_statistics.rows is None:
        return "The checkpoint keeps no rows of unlabelled images."
    if shown.get("inside", 1.0) < LEAST_INSIDE:
        return f"These are not the images that the checkpoint is for: its gate by distance lets {shown['inside']:.0%} through."
    if abs(shown["drift"]) > max(MOST_DRIFT, 3 * noise):
        return (
            "These may not be the images that the checkpoint is for: plain CLIP's answer gets "
            f"{abs(shown['drift']):.0%} {'less' if shown['drift'] > 0 else 'more'} on average than on its own."
        )
    return ""


def _trial(model: VS2CLIPForZeroShot, rows: torch.Tensor | None, seed: int) -> VS2CLIPForZeroShot:
    """The model with the statistics that the recommendation is about: fresh ones of the rows given, or its own."""
    sae = copy.deepcopy(model.sae)
    if rows is not None:
        sae.set_domain_statistics(measure_statistics(sae, rows, clip=model.clip, seed=seed))
    now = model.steering_settings
    trial = VS2CLIPForZeroShot(model.clip, sae, gamma=now.gamma, lambda_=now.lambda_)  # type: ignore[arg-type]
    return trial.eval()


# With labels


def _checked_labels(rows: Rows, labels: Any, class_names: Names | None, num_classes: int) -> torch.Tensor:
    theirs = class_names is None and are_stored(rows, labels)
    names, labels = named_labels(rows, labels, class_names)
    if names is not None and (theirs or class_names is not None) and len(names) != num_classes:
        raise ValueError(
            f"There are {len(names)} {'classes in the store' if theirs else 'class names'} and {num_classes} class "
            "embeddings: say with class_names= what the embeddings are of."
        )
    target, num_rows = torch.as_tensor(labels).cpu(), len(rows)
    if target.is_floating_point() or target.dtype == torch.bool or target.shape != (num_rows,):
        raise ValueError(
            f"labels must be {num_rows} whole numbers, one a row, -1 where none is known; these are {tuple(target.shape)}, {target.dtype}."
        )
    if ((target < -1) | (target >= num_classes)).any():
        raise ValueError(f"labels must be -1 (not known) to {num_classes - 1}; the largest is {int(target.max())}.")
    return target.long()


def _compare(
    model: VS2CLIPForZeroShot,
    blocks: Iterable[torch.Tensor],
    target: torch.Tensor,
    classes: torch.Tensor,
    seed: int,
) -> list[dict[str, Any]]:
    names = [name for name, method in METHODS.items() if method.candidate]
    steerers = {name: model.steerer.with_(method=name, gate=None) for name in ("none", *names)}
    answers: dict[str, list[torch.Tensor]] = {name: [] for name in steerers}
    classes = classes.to(model.clip.device)
    for block in blocks:
        for name, steerer in steerers.items():
            scores = steerer.class_logits(steerer.features_from_cls(block), classes)
            answers[name].append(scores.argmax(-1).cpu())
    right = {name: torch.cat(given) == target for name, given in answers.items()}
    plain = right["none"]
    top1 = {name: 100 * correct.double().mean().item() for name, correct in right.items()}
    candidates: list[dict[str, Any]] = [{"method": "none", "top1": top1["none"], "n": len(target)}]
    for name in names:
        gain = Gain.of(right[name], plain, seed=seed)
        facts = {"gain": gain.points, "gain_ci": list(gain.interval), "n": gain.n, "n_needed": _needed(gain)}
        candidates.append({"method": name, "top1": top1[name]} | facts)
    return candidates


def _needed(gain: Gain) -> int | None:
    """Labels with which a gain like this one would have an interval above (or below) 0: its half width is about
    `1.96 sqrt(p / n)`, p the share of answers that differ."""
    if gain.fixed == gain.broken:
        return None
    return math.ceil(1.96**2 * gain.n * (gain.fixed + gain.broken) / (gain.fixed - gain.broken) ** 2)


def _reconsider(method: str, candidates: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The method after the comparison, and what it says: the rule's one where it surely gains, a surely better one,
    else plain CLIP."""
    gains = {one["method"]: one for one in candidates if "gain" in one}
    best, chosen, n = max(gains.values(), key=lambda one: one["gain"]), gains.get(method), candidates[0]["n"]
    if n < LEAST_LABELS:
        return "none", f"{n} labelled images are too few to compare on; give {LEAST_LABELS} or more."
    than = 0.0 if chosen is None or chosen["gain_ci"][0] <= 0 else chosen["gain"]
    if best["gain_ci"][0] > than:
        instead = "plain CLIP" if chosen is None else f"{method} with {chosen['gain']:+.1f}"
        return best["method"], f"On {n} labelled images {best['method']} gains {_gain(best)}, in place of {instead}."
    if chosen is None:
        return "none", f"On {n} labelled images no method surely gains; the best, {best['method']}: {_gain(best)}."
    if chosen["gain_ci"][1] < 0:
        return "none", f"But on {n} labelled images it loses: {_gain(chosen)}. Keep plain CLIP."
    if chosen["gain_ci"][0] > 0:
        return method, f"On {n} labelled images it gains {_gain(chosen)}."
    needed = f"; about {chosen['n_needed']:,} labels would tell" if chosen["n_needed"] else ""
    return "none", f"{n} labelled images do not tell: {_gain(chosen)}{needed}. Keep plain CLIP until then."


def _gain(one: dict[str, Any]) -> str:
    low, high = one["gain_ci"]
    return f"{one['gain']:+.1f} points [{low:+.1f}, {high:+.1f}]"


def _number(name: str, value: float) -> str:
    if name in ("rows", "rows_per_label"):
        return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
    return f"{value:.2f}" if name == "evenness" else f"{value:.0%}"


def _table(candidates: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"On {candidates[0]['n']} labelled images:",
        "| method | top-1 | gain [95 % interval] |",
        "|---|---:|---:|",
    ]
    for one in candidates:
        gain = "-" if "gain" not in one else _gain(one).replace(" points", "")
        lines.append(f"| {_name(one['method'])} | {one['top1']:.2f} | {gain} |")
    return lines


__all__ = ["Evidence", "Recommendation", "decide", "gather_evidence", "recommend"]
