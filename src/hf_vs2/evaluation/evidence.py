"""What unlabelled images and a label set say, without any label: of a method's chances, and of whether a checkpoint is
for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..encoders.tail import plain_embeds, temperature
from ..functional.anchored import fit_anchored_prototypes


LEAST_INSIDE = 0.8
"""Share of the images inside the gate by distance: with less they are others than the checkpoint's."""
MOST_DRIFT = 0.1
"""Within predicted labels. Above what images of few labels showed; what blurs images less than this is not noticed."""
MUCH_LESS_EVEN = 0.5
"""Of the checkpoint's evenness: images that are less even are not to be fitted to."""
_GATE = 0.99
_EVEN_DRAWS = 20


@dataclass(frozen=True)
class Evidence:
    """
    What unlabelled images and a label set say, without any label. Shares are 0 to 1.

    Args:
        rows (`int`), rows_per_label (`float`): unlabelled images, and how many of them there are a label.
        confidence (`float`): mean of plain CLIP's largest probability. Said, not decided by: true CLIPs are sure where
            methods lose.
        explained (`float`): the part of what the text says of an image that the other images tell too, see
            [`fit_anchored_prototypes`]. Where it is low, there is nothing that a method could learn.
        commonest (`float`): share of the commonest label.
        evenness (`float`): of the labels among the images: the exponential of the entropy of their shares over what as
            many images have that are drawn evenly, at most 1. (96 images can't show more than 96 of 120 labels.)
        trust (`float`): how far anchored prototypes go by these images; 0 is plain CLIP.
    """

    rows: int
    rows_per_label: float
    confidence: float
    explained: float
    commonest: float
    evenness: float
    trust: float


@torch.no_grad()
def gather_evidence(embeds: torch.Tensor, classes: torch.Tensor, scale: float) -> Evidence:
    """
    Look at unlabelled images and a label set.

    Args:
        embeds: unit image embeddings of plain CLIP, `(n, projection_dim)`.
        classes: unit class embeddings, `(num_classes, projection_dim)`.
        scale: the CLIP's temperature, `exp(logit_scale)`.
    """
    fit = fit_anchored_prototypes(embeds, classes, scale)
    return Evidence(
        rows=len(embeds),
        rows_per_label=len(embeds) / len(classes),
        confidence=_sure(embeds, classes, scale).mean().item(),
        explained=fit.facts["explained"],
        commonest=fit.facts["commonest"],
        evenness=evenness(fit.received, len(embeds)),
        trust=fit.facts["trust"],
    )


def evenness(received: torch.Tensor, number: int) -> float:
    """Of labels that `received` `(num_classes,)` of `number` images: 1 where they are as even as images that are drawn
    evenly."""
    drawn = torch.ones(_EVEN_DRAWS, len(received)).multinomial(
        number, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    counts = torch.zeros(_EVEN_DRAWS, len(received)).scatter_add_(1, drawn, torch.ones(drawn.shape))
    return min(1.0, (_entropy(received.cpu()) - _entropy(counts).mean()).exp().item())


def _entropy(counts: torch.Tensor) -> torch.Tensor:
    shares = counts.double() / counts.double().sum(-1, keepdim=True)
    return -torch.special.xlogy(shares, shares).sum(-1)


def decide(evidence: Evidence) -> tuple[str, list[str]]:
    """The method, and why: `"none"` is plain CLIP."""
    told = f"{evidence.explained:.0%} of what CLIP says of an image can be told from the other images"
    if evidence.trust > 0:
        return "anchored_prototypes", [
            f"{told} (needed: 50%, trusted in full from 60%), and no label has most of them (the commonest "
            f"{evidence.commonest:.0%}). Anchored prototypes add what the images teach to CLIP's scores, here at "
            f"{evidence.trust:.0%} of their strength. Of all methods they alone gained on both kinds of encoder that "
            "were tried and lost nowhere beyond noise (docs/true-clip.md)."
        ]
    if evidence.explained <= 0.5:
        return "none", [
            f"Only {told} (needed: 50%): the labels are not the groups that these images fall into, or there are too "
            "few images. Methods "
            "that are fitted to such images lost up to tens of points on a true CLIP (docs/true-clip.md)."
        ]
    if evidence.commonest >= 0.5:
        return "none", [
            f"About {evidence.commonest:.0%} of the images are of one label: what is fitted to them would take or "
            "give that label too often."
        ]
    return "none", [f"{evidence.rows_per_label:.1f} images a label are too few to learn from."]


def embeds_of(model: VS2CLIPForZeroShot, rows: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Unit embeddings of plain CLIP."""
    return torch.cat([plain_embeds(model.clip, part).cpu() for part in rows.split(batch_size)])


def inside(model: VS2CLIPForZeroShot, rows: torch.Tensor) -> dict[str, float]:
    """Share of the rows that the checkpoint's gates would let through."""
    shares = {}
    known = model.domain_statistics
    settings = {}
    if known is not None and known.distance_quantiles:
        settings["inside"] = {"method": "distribution_norm", "gate": _GATE}
    levels = [float(level) for level in model.sae.config.fvu_quantiles or {}]
    if levels:
        settings["inside_fvu"] = {"method": "vs2", "gate": min(_GATE, max(levels))}
    for name, setting in settings.items():
        gated = model.steerer.with_(fvu_threshold=None, enabled=True, edits=None, **setting)
        steered = gated.features_from_cls(rows).steered
        assert steered is not None
        shares[name] = steered.double().mean().item()
    return shares


@dataclass(frozen=True)
class Shift:
    """
    How images differ from those that a checkpoint's statistics are of.

    Args:
        why (`str`): why the statistics say nothing of them; empty where they do.
        labels_only (`str`): what to say where they are of fewer labels, and otherwise alike.
        figures (`dict`): `drift`, by how much plain CLIP is surer of the checkpoint's images within the labels that it
            gives, and `evenness_here`.
    """

    why: str
    labels_only: str
    figures: dict[str, float]

    @property
    def calibrate(self) -> bool:
        """Whether the checkpoint is to be calibrated on these images."""
        return bool(self.why) and not self.labels_only


def shift_of(
    model: VS2CLIPForZeroShot, rows: torch.Tensor, classes: torch.Tensor, inside: float, batch_size: int
) -> Shift:
    """Other images, or other labels? Strong blur and noise leave images inside the gates, but CLIP less sure within
    each label that it gives; where only the labels' shares differ, it is as sure."""
    known = model.domain_statistics
    if known is None or known.rows is None:
        return Shift("The checkpoint keeps no rows of unlabelled images.", "", {})
    scale = float(temperature(model.clip))  # of SigLIP too: how much surer one label is than the others is compared
    ours, theirs = (embeds_of(model, one, batch_size) for one in (rows, known.rows))
    drift, noise = Sureness.of(ours, classes, scale).drift_from(Sureness.of(theirs, classes, scale))
    even, before = (
        evenness(fit_anchored_prototypes(one, classes, scale).received, len(one)) for one in (ours, theirs)
    )
    figures = {"drift": drift, "evenness_here": even}
    why = why_others(inside, drift, noise)
    uneven = even < MUCH_LESS_EVEN * before and inside >= LEAST_INSIDE
    labels_only = (
        f"Your images are of few of the labels (evenness {even:.2f}, the checkpoint's {before:.2f}). Don't calibrate "
        "on them: what is fitted to such images loses most. "
        + (
            "Gather images of all labels for that."
            if why
            else "Otherwise they are like the checkpoint's: keep it as it is."
        )
    )
    return Shift(why, labels_only if uneven else "", figures)


def _sure(embeds: torch.Tensor, classes: torch.Tensor, scale: float) -> torch.Tensor:
    return (scale * embeds @ classes.T).softmax(-1).amax(-1).double()


class Sureness:
    """
    How sure plain CLIP is of its answers, label by label: sums, whose size does not grow with the images.

    Args:
        num_classes (`int`): labels to choose from.
    """

    def __init__(self, num_classes: int):
        self.sums = torch.zeros(3, num_classes, dtype=torch.float64)
        """Images, their probabilities and the squares of these, of each label."""

    @classmethod
    def of(cls, embeds: torch.Tensor, classes: torch.Tensor, scale: float) -> Sureness:
        """Of unit image embeddings `(n, projection_dim)` for unit class embeddings."""
        found = cls(len(classes))
        found.add((embeds @ classes.T).argmax(-1), _sure(embeds, classes, scale))
        return found

    def add(self, answers: torch.Tensor, probabilities: torch.Tensor) -> None:
        """Plain CLIP's answers `(n,)`, as places in the labels, and the probability that it gives each."""
        sure = probabilities.double()
        self.sums.index_add_(1, answers, torch.stack([torch.ones_like(sure), sure, sure.square()]))

    def drift_from(self, theirs: Sureness) -> tuple[float, float]:
        """By how much plain CLIP is surer of their images, label by label that it gives, weighted as these have them,
        and the standard error of that."""
        shared = (self.sums[0] > 0) & (theirs.sums[0] > 0)
        numbers = self.sums[0, shared]
        means, errors = [], []
        for one in (self, theirs):
            count, total, squares = one.sums[:, shared]
            means.append(total / count)
            errors.append((squares / count - means[-1].square()).clamp_min(0) / count)
        count = max(1.0, numbers.sum().item())
        drift = (numbers * (means[1] - means[0])).sum().item() / count
        return drift, (numbers.square() * (errors[0] + errors[1])).sum().item() ** 0.5 / count


def why_others(inside: float, drift: float, noise: float) -> str:
    """Why images are others than the checkpoint's; empty where nothing says so.

    Args:
        inside: share of them inside its gate by distance. drift, noise: see [`Sureness`].
    """
    if inside < LEAST_INSIDE:
        return f"These are not the images that the checkpoint is for: its gate by distance lets {inside:.0%} through."
    if abs(drift) > max(MOST_DRIFT, 3 * noise):
        return (
            "These may not be the images that the checkpoint is for: within the labels that it gives, plain CLIP is "
            f"{abs(drift):.0%} {'less' if drift > 0 else 'more'} sure of them than of its own."
        )
    return ""


SHOWN_EVIDENCE = {
    "inside": "of your images inside the checkpoint's gate by distance",
    "inside_fvu": "of your images inside its gate by FVU",
    "drift": "more confidence of plain CLIP in the checkpoint's images than in yours, label by label",
    "evenness_here": "evenness of the labels among your images (1: as even as so many images can be)",
    "rows": "unlabelled images that methods are fitted to",
    "rows_per_label": "of them a label",
    "confidence": "mean probability of plain CLIP's answer",
    "explained": "of what CLIP says of them can be told from the other images (needed: 50%)",
    "commonest": "of them of the commonest label (at most 60%)",
    "evenness": "evenness of the labels among them",
    "trust": "of their strength for anchored prototypes",
}
"""What each number of the evidence is, for people."""


def evidence_text(name: str, value: float) -> str:
    """A number of the evidence as people read it."""
    if name in ("rows", "rows_per_label"):
        return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
    return f"{value:.2f}" if name.startswith("evenness") else f"{value:.0%}"
