"""Which latents moved which score by how much.

A score is a logit: the cosine of image and label times CLIP's logit scale, the number that goes into the softmax.
Steering adds a weighted sum of decoder directions to the CLS row; what follows is affine but for two numbers of a row,
LayerNorm's deviation and the length of the embedding. With those of the steered row held fixed,

    steered = plain + normalisation + replacement + sum of the latents' contributions

holds exactly; [`hf_vs2.functional.score_parts`] has the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch.nn.functional import normalize
from transformers.utils import ModelOutput

from ..encoders.tail import (
    bias,
    check_scores,
    fold_tail,
    is_sigmoid,
    plain_embeds,
    rows_for,
    temperature,
    unit_embeds,
)
from ..functional.equations import ScoreParts, score_parts
from ..methods import METHODS


if TYPE_CHECKING:
    from ..steering.corpus_search import RetrievalInputs
    from ..steering.steerer import Steerer

_NUMBERS_AT_ONCE = 2**23


@dataclass
class VS2Explanation(ModelOutput):
    """
    For each image and label the score before and after steering, and what each latent did to it. Tensors are on the
    CPU, scores in float64, so that the parts add up:
    `plain_scores + normalisation + replacement + contributions.sum(-1) == steered_scores`.

    Args:
        plain_scores, steered_scores (`torch.Tensor` of shape `(batch, num_labels)`): logits, as in `logits_per_image`.
        contributions (`torch.Tensor` of shape `(batch, num_labels, m)`): of each latent to each score.
        normalisation (`torch.Tensor` of shape `(batch, num_labels)`): what `post_layernorm` and the unit length of the
            embedding, set by the steered row, do to the score of the plain one. It belongs to no single latent.
        replacement (`torch.Tensor` of shape `(batch, num_labels)`): with `method="amplify"` what the SAE's
            reconstruction does in the place of the row; with methods that change scores alone (prototypes,
            distribution norm) all that they change; 0 otherwise.
        latent_indices (`torch.Tensor` of shape `(batch, m)`): the latents that are active or changed. Where an image
            has fewer than another, others with value and change 0 fill its row.
        latent_values (`torch.Tensor` of shape `(batch, m)`): their values in the image's own code, 0 where not active.
        latent_changes (`torch.Tensor` of shape `(batch, m)`): what steering adds to those values.
        fvu (`torch.Tensor` of shape `(batch,)`): per-sample FVU.
        steered (`torch.BoolTensor` of shape `(batch,)`): which images were steered; the others have changes and
            contributions of 0.
        labels (`tuple[str, ...]`): the labels.
        names (`dict[int, str]`): names of latents, of those that have one.
        sigmoid (`bool`): whether each label is scored by itself, as SigLIP does it: probabilities are then sigmoids of
            the scores, else their softmax.
    """

    plain_scores: torch.Tensor = None  # type: ignore[assignment]
    steered_scores: torch.Tensor = None  # type: ignore[assignment]
    contributions: torch.Tensor = None  # type: ignore[assignment]
    normalisation: torch.Tensor = None  # type: ignore[assignment]
    replacement: torch.Tensor = None  # type: ignore[assignment]
    latent_indices: torch.Tensor = None  # type: ignore[assignment]
    latent_values: torch.Tensor = None  # type: ignore[assignment]
    latent_changes: torch.Tensor = None  # type: ignore[assignment]
    fvu: torch.Tensor = None  # type: ignore[assignment]
    steered: torch.Tensor = None  # type: ignore[assignment]
    labels: tuple[str, ...] = None  # type: ignore[assignment]
    names: dict[int, str] = None  # type: ignore[assignment]
    sigmoid: bool = None  # type: ignore[assignment]

    tensor_fields: ClassVar[tuple[str, ...]] = (
        *("plain_scores", "steered_scores", "contributions", "normalisation", "replacement"),
        *("latent_indices", "latent_values", "latent_changes", "fvu", "steered"),
    )

    def parts(
        self,
        label: str | int,
        image: int = 0,
        top: int | None = 5,
        *,
        against: str | int | None = None,
        raw: bool = False,
    ) -> dict[str, Any]:
        """
        One score of one image taken apart, as plain numbers.

        A change that all labels share changes no probability of a softmax, and steering's is mostly such. So every
        number is by default that of the label less the mean of all labels', which sums just as well. Where each label
        is scored by itself (`sigmoid`), the numbers are by default as they are.

        Args:
            label: a label or its place.
            image: which of the batch.
            top: how many latents to list, those of the largest contribution by size first; `None` for all.
            against: another label to take instead of the mean: then the numbers are of the margin between the two.
            raw: take the label's numbers as they are; so are those of a single label.

        Returns:
            `dict`: `label`, `relative_to` (`"mean"`, the other label, or `None`), `plain`, `steered`, `normalisation`,
                `replacement`,
            `latents` (a list of `{"latent", "name", "value", "change", "contribution"}`) and `others`, the sum of the
            latents not listed. `plain + normalisation + replacement + others + sum of the contributions` is `steered`.

        Raises:
            `ValueError`: for a label that is not among the labels, and for `raw` with `against`.
        """
        if raw and against is not None:
            raise ValueError("raw=True and against= exclude each other: give one of them.")
        place = self._place(label)
        other = None if against is None else self._place(against)
        raw = raw or len(self.labels) == 1 or (self.sigmoid and other is None)
        relative = "mean" if other is None else self.labels[other]

        def of(scores: torch.Tensor) -> torch.Tensor:
            scores = scores[image]
            if raw:
                return scores[place]
            return scores[place] - (scores.mean(0) if other is None else scores[other])

        contributions, names = of(self.contributions), self.names
        latents, values, changes = (
            column[image].tolist() for column in (self.latent_indices, self.latent_values, self.latent_changes)
        )
        ranked = contributions.abs().argsort(descending=True, stable=True)
        order = ranked[self.latent_changes[image, ranked] != 0].tolist()
        listed, rest = (order, []) if top is None else (order[:top], order[top:])
        return {
            "label": self.labels[place],
            "relative_to": None if raw else relative,
            "plain": of(self.plain_scores).item(),
            "steered": of(self.steered_scores).item(),
            "normalisation": of(self.normalisation).item(),
            "replacement": of(self.replacement).item(),
            "latents": [
                {
                    "latent": latents[one],
                    "name": names.get(latents[one]),
                    "value": values[one],
                    "change": changes[one],
                    "contribution": contributions[one].item(),
                }
                for one in listed
            ],
            "others": contributions[rest].sum().item(),
        }

    def top(self, label: str | int, n: int = 5, image: int = 0, **options: Any) -> list[dict[str, Any]]:
        """The `n` latents that moved a label's score most, up or down; options as in [`VS2Explanation.parts`]."""
        return self.parts(label, image, n, **options)["latents"]

    def to_dict(self, top: int | None = None, *, raw: bool = False) -> list[dict[str, Any]]:
        """For each image `fvu`, `steered`, `active_latents` and for each label its probabilities, `plain_probability`
        and `steered_probability`, and its [`parts`]: ready for JSON."""
        probabilities = [part.tolist() for part in self.probabilities()]
        return [
            {
                "fvu": self.fvu[image].item(),
                "steered": self.steered[image].item(),
                "active_latents": int((self.latent_values[image] != 0).sum()),
                "labels": [
                    {
                        **self.parts(place, image, top, raw=raw),
                        "plain_probability": probabilities[0][image][place],
                        "steered_probability": probabilities[1][image][place],
                    }
                    for place in range(len(self.labels))
                ],
            }
            for image in range(len(self.plain_scores))
        ]

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of plain and of steered scores, `(batch, num_labels)` each."""
        plain, steered = (
            scores.sigmoid() if self.sigmoid else scores.softmax(-1)
            for scores in (self.plain_scores, self.steered_scores)
        )
        return plain, steered

    def _place(self, label: str | int) -> int:
        if isinstance(label, str):
            if label not in self.labels:
                raise ValueError(f"{label!r} is not among the labels {list(self.labels)[:20]}.")
            return self.labels.index(label)
        if not -len(self.labels) <= label < len(self.labels):
            raise ValueError(f"There are {len(self.labels)} labels; number {label} is not among them.")
        return label % len(self.labels)


@torch.no_grad()
def explain_rows(
    steerer: Steerer,
    rows: torch.Tensor,
    class_embeds: torch.Tensor,
    labels: Sequence[str] | None,
    names: Mapping[int, str],
    retrieval: RetrievalInputs,
    image_name: Callable[[int], str] = "row {}".format,
) -> VS2Explanation:
    """The explanation of CLS rows `(batch, hidden_size)` of the last layer; class embeddings may have any length.

    Raises:
        `ValueError`: if steering does not go through latents of the last layer alone, on labels of another number,
            and naming the first row, class or score that is not finite.
    """
    check_explainable(steerer)
    class_embeds = class_embeds.detach()
    labels = tuple(map(str, range(len(class_embeds)))) if labels is None else tuple(labels)
    if len(labels) != len(class_embeds):
        raise ValueError(f"There are {len(labels)} labels for {len(class_embeds)} class embeddings: give one each.")
    plain_embeds(steerer.clip, rows, image_name)
    unit_embeds(class_embeds, lambda row: f"the label {labels[row]!r}")
    tail = _DoubleTail(steerer, normalize(class_embeds.cpu().double(), dim=-1))
    moves, fvu, steered = _moves(steerer, rows, class_embeds, retrieval)
    at_once = max(1, _NUMBERS_AT_ONCE // max(1, moves.change.shape[1] * moves.x.shape[1]))
    batches = [tail.parts(_Moves(*batch)) for batch in zip(*(part.split(at_once) for part in moves), strict=True)]
    parts = ScoreParts(*(torch.cat(part) for part in zip(*batches, strict=True)))
    if _scores_rows_as_they_are(steerer):
        added = _added(steerer, rows, class_embeds)
        parts = parts._replace(steered=parts.steered + added, replacement=parts.replacement + added)
    check_scores(steerer.clip, torch.cat([part.flatten(1) for part in parts], dim=1), image_name)
    return VS2Explanation(
        plain_scores=parts.plain,
        steered_scores=parts.steered,
        contributions=parts.contributions,
        normalisation=parts.normalisation,
        replacement=parts.replacement,
        latent_indices=moves.latents,
        latent_values=moves.values,
        latent_changes=moves.change,
        fvu=fvu.cpu(),
        steered=steered.cpu(),
        labels=labels,
        names=dict(names),
        sigmoid=is_sigmoid(steerer.clip),
    )


class _Moves(NamedTuple):
    """What steering does to each row, in float64 on the CPU."""

    x: torch.Tensor
    start: torch.Tensor
    """Both `(batch, hidden_size)`; see [`LatentStep`]."""
    latents: torch.Tensor
    values: torch.Tensor
    change: torch.Tensor
    """`(batch, m)`, each latent once."""
    keeps_norm: torch.Tensor
    """bool `(batch,)`."""


def _moves(
    steerer: Steerer, rows: torch.Tensor, class_embeds: torch.Tensor, retrieval: RetrievalInputs
) -> tuple[_Moves, torch.Tensor, torch.Tensor]:
    """The moves, the FVU and which rows are steered. Those that are not move by nothing."""
    sae, rows = steerer.sae, rows_for(steerer.clip, rows)
    retrieval["class_embeds"] = class_embeds
    # With steering off, or where rows stay as they are, nothing of the method is in the rows; their code is asked for
    # all the same.
    stays = not steerer.is_steering or _scores_rows_as_they_are(steerer)
    asked = steerer.with_(method="none", edits=None, gate=None, fvu_threshold=None) if stays else steerer
    record, batch, step = asked.move(rows, -1, **retrieval)
    steered = record.steered
    if stays:
        steered = steerer.steer(rows).steered if steerer.is_steering else torch.zeros_like(steered)
    x, values = batch.x, _by_latent(batch.values, batch.indices, len(sae.W_dec))
    if step is None:
        start, change, keeps_norm = x, torch.zeros_like(values), False
    else:
        start = torch.where(steered.unsqueeze(-1), step.start, x)
        change = torch.where(steered.unsqueeze(-1), _by_latent(step.change, step.latents, len(sae.W_dec)), 0)
        keeps_norm = step.keeps_norm
    size = values.abs() + change.abs()
    latents = size.topk(int((size != 0).sum(-1).max()) if len(size) else 0, dim=-1).indices
    moves = (x, start, latents, values.gather(1, latents), change.gather(1, latents), steered & keeps_norm)
    return (
        _Moves(*(part.cpu() if part.dtype in (torch.bool, torch.int64) else part.cpu().double() for part in moves)),
        batch.code.fvu,
        steered,
    )


def _scores_rows_as_they_are(steerer: Steerer) -> bool:
    """Whether the method changes scores alone: what it adds to plain CLIP's is then of no latent."""
    rule = steerer.settings.rule
    return steerer.is_steering and rule.fit is not None and rule.step is None and steerer.settings.edits is None


def _added(steerer: Steerer, rows: torch.Tensor, class_embeds: torch.Tensor) -> torch.Tensor:
    """What such a method adds to the logits of rows, float64 `(batch, num_labels)`."""
    images = steerer.features_from_cls(rows)
    embeds = unit_embeds(images.features)
    classes = normalize(class_embeds.float(), dim=-1).to(embeds.device)
    added = steerer.scores(images, embeds, classes) - embeds @ classes.T
    return temperature(steerer.clip).cpu().double() * added.cpu().double()


def _by_latent(entries: torch.Tensor, latents: torch.Tensor, num_latents: int) -> torch.Tensor:
    """The entries of a sparse code in a row of all latents, `(batch, num_latents)`; a latent that comes twice is
    summed."""
    dense = entries.new_zeros(len(entries), num_latents)
    return dense.scatter_add(1, latents, entries)


class _DoubleTail:
    """The way from rows to scores, in float64 on the CPU: sums come out exact, and not every device has float64."""

    def __init__(self, steerer: Steerer, class_embeds: torch.Tensor):
        clip = steerer.clip
        self.tail = fold_tail(clip, class_embeds, "cpu")
        self.length = fold_tail(clip, torch.eye(class_embeds.shape[1]), "cpu")[:2]
        self.logit_scale, self.logit_bias = temperature(clip).cpu().double(), bias(clip).cpu().double()
        self.decoder = steerer.sae.W_dec

    def parts(self, moves: _Moves) -> ScoreParts:
        """The logits of some rows, taken apart."""
        directions = self.decoder[moves.latents.to(self.decoder.device)].cpu().double()
        moved = moves.start + torch.einsum("bm,bmh->bh", moves.change, directions)
        length = moved.norm(dim=-1)
        # As `keep_norm`: a row moved to exactly 0 stays 0.
        kept = torch.where(length > 0, moves.x.norm(dim=-1) / length, 0)
        scale = torch.where(moves.keeps_norm, kept, 1)
        found = score_parts(moves.x, moves.start, moves.change, directions, scale, self.tail, self.length)
        found = ScoreParts(*(self.logit_scale * part for part in found))
        return found._replace(plain=found.plain + self.logit_bias, steered=found.steered + self.logit_bias)


def check_explainable(steerer: Steerer) -> None:
    """Refuse, by a `ValueError`, settings under which scores are no sums over latents."""
    last, layers = steerer.num_layers - 1, list(steerer.saes)
    if layers != [last]:
        raise ValueError(
            f"Scores are sums over latents where the last layer ({last}) alone is steered; this model steers layers "
            f"{layers}, and what the layers above make of that is no sum. Explain VS2CLIPForZeroShot(clip, sae) with "
            "the last layer's SAE."
        )
    rule = steerer.settings.rule
    if _scores_rows_as_they_are(steerer):
        return
    # Edits make a sum of any step; what is fitted to a label set does not score by cosines.
    if steerer.is_steering and not rule.explains and (rule.fit is not None or steerer.settings.edits is None):
        explained = [name for name, method in METHODS.items() if method.explains]
        raise ValueError(
            f"The scores of method={rule.name!r} are no sums over latents. Explain one of {explained}, as in "
            f"model.steering(method={explained[0]!r})."
        )
