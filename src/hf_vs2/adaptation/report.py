"""What a report says, as plain values: `report.json`, and what the page and the terminal show of it."""

from __future__ import annotations

import shlex
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..evaluation.few_shot import FEW_SHOT
from ..evaluation.metrics import Gain, gain_text
from ..evaluation.recommendation import LEAST_LABELS, Recommendation
from ..methods import method_named
from ..version import __version__
from .answers import Answers, clearest, confidence, pairs, rejection
from .checked import TO_LABEL
from .names import TO_LABEL_NAME


FEW_SHOT_TOLD = (
    "nearest_mean, tip_adapter and linear_probe learn from the checked labels, each fifth of the images from the "
    "other four. They are no methods of the checkpoint: where they win by far, train on your labels instead."
)
FORMAT, FORMAT_VERSION = "hf_vs2.adaptation", 1


def report_of(
    request: Mapping[str, Any],
    *,
    found: Recommendation,
    few_shot: Mapping[str, torch.Tensor],
    sae: Mapping[str, Any],
    answers: Answers,
    truth: torch.Tensor | None,
    names: Sequence[str],
    images: Mapping[str, Any],
    clip: str,
    folder: Path,
    again: str,
) -> dict[str, Any]:
    """
    Args:
        request: what it is a report of, by which a second run is recognised.
        found: the recommendation. few_shot: see [`cross_answers`], of the checked images. sae: its training's figures,
            and whether it is trusted.
        answers: of all images. truth: their labels where they are checked, `(n,)`, -1 elsewhere.
        names: of the images. images, clip: where they come from.
        folder: of the checkpoint. again: the command that repeats the adaptation.
    """
    labels = request["labels"]
    changed = answers.changed
    number = len(changed)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "hf_vs2_version": __version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "request": dict(request),
        "clip": clip,
        "images": dict(images),
        "labels": list(labels),
        "templates": list(request["templates"]),
        "chosen": {
            "method": found.method,
            "label": method_named(found.method).label,
            "decided_by": "checked labels" if found.candidates else "unlabelled images",
            "why": _reasons(found),
            "evidence": found.evidence,
            "without_labels": found.by_rule,
        },
        "sae": dict(sae),
        "changes": {
            "number": number,
            "share": number / len(answers.plain),
            "pairs": pairs(answers, labels),
            "clearest": [_example(answers, row, names, labels, truth) for row in clearest(answers)],
        },
        "calibration": _calibration(answers, truth),
        "checked": None if not found.candidates else _checked(found, few_shot, answers, truth, names, labels),
        "reject": rejection(answers),
        "not_known": _not_known(found),
        "next": _next(found, request, folder, again),
    }


def _reasons(found: Recommendation) -> list[str]:
    """Why, with what decides first."""
    if not found.candidates:
        return found.reasons
    by_rule, *by_labels = found.reasons
    return [*by_labels, f"Without labels the answer is {method_named(found.by_rule).label}: {by_rule}"]


def _example(
    answers: Answers, row: int, names: Sequence[str], labels: Sequence[str], truth: torch.Tensor | None
) -> dict[str, Any]:
    checked = None if truth is None or truth[row] < 0 else labels[int(truth[row])]
    return {
        "row": row,
        "file": names[row],
        "plain": labels[int(answers.plain[row])],
        "plain_score": answers.plain_confidence[row].item(),
        "adapted": labels[int(answers.adapted[row])],
        "adapted_score": answers.adapted_confidence[row].item(),
        "checked": checked,
    }


def _calibration(answers: Answers, truth: torch.Tensor | None) -> dict[str, Any]:
    found = {
        "plain": confidence(answers.plain_confidence),
        "adapted": confidence(answers.adapted_confidence),
    }
    known = None if truth is None else (truth >= 0).nonzero().squeeze(-1)
    if truth is not None and known is not None and len(known):
        for name, given, sure in (
            ("plain", answers.plain, answers.plain_confidence),
            ("adapted", answers.adapted, answers.adapted_confidence),
        ):
            found[name]["checked"] = confidence(sure[known], given[known] == truth[known])
    return found


def _checked(
    found: Recommendation,
    few_shot: Mapping[str, torch.Tensor],
    answers: Answers,
    truth: torch.Tensor | None,
    names: Sequence[str],
    labels: Sequence[str],
) -> dict[str, Any]:
    assert truth is not None
    known = truth >= 0
    target, before = truth[known], answers.plain[known] == truth[known]
    fitted = []
    for name, answered in few_shot.items():
        right = answered == target
        gain = Gain.of(right, before)
        top1 = 100 * right.double().mean().item()
        fitted.append({"method": name, "top1": top1, "gain": gain.points, "gain_ci": list(gain.interval), "n": gain.n})
    plain, adapted = answers.plain == truth, answers.adapted == truth
    fixed, broken = (known & ~plain & adapted), (known & plain & ~adapted)
    return {
        "n": int(known.sum()),
        "methods": found.candidates,
        "few_shot": fitted,
        "fixed": [_example(answers, row, names, labels, truth) for row in fixed.nonzero().squeeze(-1).tolist()[:12]],
        "broken": [_example(answers, row, names, labels, truth) for row in broken.nonzero().squeeze(-1).tolist()[:12]],
        "num_fixed": int(fixed.sum()),
        "num_broken": int(broken.sum()),
    }


def _not_known(found: Recommendation) -> list[str]:
    if found.candidates and found.candidates[0]["n"] >= LEAST_LABELS:
        n = found.candidates[0]["n"]
        return [
            f"How good the answers are on all your images: {n} of them were checked, and the intervals say how far "
            "the rest may differ. They hold if the checked images were drawn at random, as those of to_label.csv are.",
            "How good the answers are on images of another kind than these.",
        ]
    return [
        "How many answers are right, of plain CLIP or adapted: that takes labels. A changed answer may be better or "
        "worse.",
        "Whether the probabilities can be believed: that takes labels, too. They tend to be too high, the adapted "
        "ones more so.",
        "How good the answers are on images of another kind than these.",
    ]


def _next(found: Recommendation, request: Mapping[str, Any], folder: Path, again: str) -> list[dict[str, str]]:
    to_label, steps = folder / TO_LABEL_NAME, []
    if not found.candidates:
        steps = [
            {
                "what": f"Fill in the column label of {to_label} ({TO_LABEL} images at most, drawn at random; leave "
                "it empty where no label fits, not where it is hard to say), and let the labels decide:",
                "command": f"{again} --checked {shlex.quote(str(to_label))}",
            }
        ]
    command = f"hf-vs2 classify IMAGES --checkpoint {shlex.quote(str(folder))}"
    return [*steps, {"what": "Label images, with these labels and prompts:", "command": command}]


def told(report: Mapping[str, Any]) -> list[str]:
    """The report for a terminal."""
    chosen, changes, calibration = report["chosen"], report["changes"], report["calibration"]
    lines = [f"Chosen, by {chosen['decided_by']}: {chosen['label']}"]
    lines += [f"- {reason}" for reason in [*chosen["why"], report["sae"]["why"]]]
    lines += ["", change_sentence(report)]
    lines += [f"  {one['number']:>6,}  {one['from']} -> {one['to']}" for one in changes["pairs"][:5]]
    sure = {name: calibration[name]["mean_confidence"] for name in ("plain", "adapted")}
    lines += ["", f"Mean probability of the answer: plain CLIP {sure['plain']:.0%}, adapted {sure['adapted']:.0%}."]
    lines += [
        f"On the {one['n']} checked images: {name} {one['accuracy']:.0%} right, calibration error "
        f"(ECE) {one['ece']:.2f}."
        for name, one in ((name, calibration[name].get("checked")) for name in ("plain", "adapted"))
        if one
    ]
    if report["checked"]:
        lines += ["", *method_lines([*report["checked"]["methods"], *report["checked"]["few_shot"]])]
        if report["checked"]["few_shot"]:
            lines += textwrap.wrap(FEW_SHOT_TOLD, 80)
    return [*lines, "", "Not known:", *(f"- {one}" for one in report["not_known"])]


def change_sentence(report: Mapping[str, Any]) -> str:
    changes, number = report["changes"], report["images"]["number"]
    if report["chosen"]["method"] == "none":
        return f"Plain CLIP is kept: no answer of {number:,} changes."
    return f"{changes['number']:,} of {number:,} answers change ({changes['share']:.1%})."


def method_label(name: str) -> str:
    """As tables have it; what learns from labels is no method, and has its name."""
    return name if name in FEW_SHOT else method_named(name).label


def method_lines(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each method's accuracy on the checked images, and its gain over plain CLIP."""
    width = max(len(method_label(one["method"])) for one in methods)
    lines = [f"{'method':<{width}}  top-1  gain over plain CLIP [95 % interval]"]
    for one in methods:
        gain = gain_text(one["gain"], one["gain_ci"]) if "gain" in one else "-"
        lines.append(f"{method_label(one['method']):<{width}}  {one['top1']:5.1f}  {gain}")
    return lines
