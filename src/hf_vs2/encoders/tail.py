"""What stands between a CLS row and its class scores in a CLIP: run, or folded into one affine map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize
from transformers import CLIPModel

from ..files.weight_files import LARGEST
from ..functional.finite import first_broken_row
from ..functional.label_free import exact
from .families import embedding_width, family_of, tower_of
from .wrapped import device_of, weights_of


def clip_embeds(clip: CLIPModel, rows: torch.Tensor) -> torch.Tensor:
    """Plain CLIP's image features of CLS rows of its last layer: `(batch, projection_dim)`, float32, not
    normalised."""
    return project(clip, rows_for(clip, rows)).float()


def rows_for(clip: CLIPModel, rows: torch.Tensor) -> torch.Tensor:
    """Rows of its last layer `(batch, hidden_size)` as its tail takes them, on its device and in its dtype."""
    module, _, name = family_of(clip).row_weight.rpartition(".")
    (weight,) = weights_of(tower_of(clip).get_submodule(module), name)
    return rows.to(device=weight.device, dtype=weight.dtype)


def plain_outputs(clip: CLIPModel, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
    """Its vision tower's output of images, with image features `(batch, projection_dim)` as `pooler_output`, as
    `CLIPModel.get_image_features` gives them."""
    outputs = tower_of(clip)(pixel_values=pixel_values, **kwargs)
    outputs.pooler_output = project(clip, family_of(clip).row(outputs))
    return outputs


def tail_parameters(clip: CLIPModel) -> list[nn.Parameter]:
    """The weights of its tail."""
    family = family_of(clip)
    return [*family.norm(clip).parameters(), *family.projection(clip).parameters()]


def project(clip: CLIPModel, rows: torch.Tensor) -> torch.Tensor:
    """Its tail: rows of the last layer to image features `(batch, projection_dim)`, not normalised."""
    family = family_of(clip)
    return family.projection(clip)(family.norm(clip)(rows))


def unit_embeds(features: Any, name: Callable[[int], str] = "row {}".format) -> torch.Tensor:
    """What a CLIP gives for images or texts, `(batch, projection_dim)`, in float32 and of unit length. Length 0 stays
    0. NaN, infinity, and squares that overflow are a `ValueError` with the `name` of the first such row."""
    embeds = features.float()
    broken = first_broken_row(embeds.detach().square().sum(-1))
    if broken is not None:
        raise ValueError(
            f"The CLIP gives no finite embedding for {name(broken)}. Where it overflows in {features.dtype}, load it "
            "with dtype=torch.float32; otherwise its weights, or image_mean and image_std of its image processor, are "
            "damaged."
        )
    return normalize(embeds, dim=-1)


def plain_embeds(clip: CLIPModel, rows: torch.Tensor, name: Callable[[int], str] = "row {}".format) -> torch.Tensor:
    """Plain CLIP's unit image embeddings of CLS rows of its last layer, float32 `(batch, projection_dim)`; see
    [`unit_embeds`]."""
    return unit_embeds(clip_embeds(clip, rows), name)


def mean_embed(clip: CLIPModel, blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean of [`plain_embeds`] over blocks of rows, `(projection_dim,)` on the CPU; summed in float64."""
    total, number = torch.zeros(embedding_width(clip), dtype=torch.float64), 0
    for block in blocks:
        total += exact(plain_embeds(clip, block)).sum(0).cpu()
        number += len(block)
    return (total / number).float()


def at_temperature(clip: CLIPModel, scores: torch.Tensor) -> torch.Tensor:
    """Float32 cosines `(batch, num_classes)` as the CLIP's logits."""
    return scores * temperature(clip).to(scores.device) + bias(clip).to(scores.device)


def bias(clip: CLIPModel) -> torch.Tensor:
    """What is added to logits: `logit_bias`, float32; 0 where scores are a softmax."""
    held = getattr(clip, "logit_bias", None)
    return torch.zeros(()) if held is None else weights_of(clip, "logit_bias")[0].float()


def cosine_of(clip: CLIPModel, logits: torch.Tensor) -> torch.Tensor:
    """The cosines that plain logits were made of, float32."""
    return (logits.float() - bias(clip).to(logits.device)) / temperature(clip).to(logits.device)


def is_sigmoid(clip: CLIPModel) -> bool:
    """Whether it scores each label by itself, as SigLIP does."""
    return getattr(clip, "logit_bias", None) is not None


def probabilities(logits: torch.Tensor, clip: CLIPModel) -> torch.Tensor:
    """Of logits `(..., num_classes)`: a softmax, or with a `logit_bias` (SigLIP) a sigmoid of each label by itself."""
    return logits.sigmoid() if is_sigmoid(clip) else logits.softmax(-1)


def logits_of_images(
    clip: CLIPModel, features: torch.Tensor, scores: Callable[[torch.Tensor], torch.Tensor], name: Callable[[int], str]
) -> torch.Tensor:
    """Float32 logits `(batch, num_classes)` of image features `(batch, projection_dim)`, whose cosines are `scores` of
    the unit embeddings. They are checked as by [`unit_embeds`] and [`check_scores`]; a GPU is waited for once."""
    embeds = features.float()
    logits = at_temperature(clip, scores(normalize(embeds, dim=-1)))
    if first_broken_row(logits.detach(), embeds.detach().square().sum(-1)) is not None:
        unit_embeds(features, name)
        check_scores(clip, logits, name)
    return logits


def check_scores(clip: CLIPModel, scores: torch.Tensor, name: Callable[[int], str] = "row {}".format) -> torch.Tensor:
    """The scores `(batch, ...)` as they are. Whatever becomes an answer passes here: a `ValueError` names the first
    row without finite scores, or the temperature that makes them so."""
    broken = first_broken_row(scores.detach())
    if broken is not None:
        check_temperature(clip)
        raise ValueError(
            f"The scores of {name(broken)} are not finite, though its embedding is: class embeddings, statistics of "
            "unlabelled images or the SAE's code hold NaN or infinity. Make them again."
        )
    return scores


def temperature(clip: CLIPModel) -> torch.Tensor:
    """`exp(logit_scale)`, float32; that of OpenAI's CLIPs, 100, where a model without texts has none."""
    if not hasattr(clip, "logit_scale"):
        return torch.tensor(100.0)
    (scale,) = weights_of(clip, "logit_scale")
    return scale.float().exp()


def check_temperature(clip: Any, where: str | None = None) -> None:
    """Refuse, by a `ValueError` with `where` the CLIP is from, one whose scores would be infinite, or all the same."""
    held = getattr(clip, "logit_scale", None)
    scale = 0.0 if held is None or held.is_meta else held.item()
    if not abs(scale) <= math.log(LARGEST):  # not with NaN either
        raise ValueError(
            f"{where or clip.config._name_or_path or 'The CLIP given'} is damaged: logit_scale is {scale:g}, so that "
            "scores would be multiplied by e to that power; CLIP's own is 4.6. Save or download it again."
        )


def softmax_temperature(clip: CLIPModel) -> float:
    """`exp(logit_scale)`. A model that scores each label by itself, by a sigmoid (SigLIP), is a `ValueError`: its
    answers are no probabilities to fit to."""
    if is_sigmoid(clip):
        raise ValueError(
            f"A {type(clip).__name__} scores labels by a sigmoid, each by itself, and this method shares each image "
            "out among the labels by a softmax. Choose another one, such as method='vs2'."
        )
    check_temperature(clip)
    return float(temperature(clip).detach())


class Tail(NamedTuple):
    """LayerNorm, projection and class embeddings as one affine map of a centred, scaled row, in float64."""

    weight: torch.Tensor
    """`C W diag(g)`, `(num_classes, hidden_size)`."""
    bias: torch.Tensor
    """`C W b`, `(num_classes,)`."""
    eps: float | None
    """Of the LayerNorm; `None` where a family has none: the map is then of the row itself."""


def fold_tail(clip: CLIPModel, class_embeds: torch.Tensor, device: torch.device | str | None = None) -> Tail:
    """The [`Tail`] of a CLIP and class embeddings `(num_classes, projection_dim)`, by default on the CLIP's device.

    Raises:
        ValueError: the tail is neither the affine LayerNorm nor the linear map without bias that the families have, or
            the embeddings have another width or are not finite.
    """
    norm, projection = (part(clip) for part in (family_of(clip).norm, family_of(clip).projection))
    if not ((type(norm) is nn.LayerNorm and norm.bias is not None) or type(norm) is nn.Identity) or not (
        (type(projection) is nn.Linear and projection.bias is None) or type(projection) is nn.Identity
    ):
        raise ValueError(
            "Explanations and grids of settings are worked out from post_layernorm and visual_projection as CLIPModel "
            f"has them; these are {norm} and {projection} of a {type(clip).__name__}. Use a CLIP with its own."
        )
    width = embedding_width(clip)
    if class_embeds.ndim != 2 or class_embeds.shape[1] != width:
        raise ValueError(f"class_embeds must be (num_classes, {width}); they are {tuple(class_embeds.shape)}.")
    broken = first_broken_row(class_embeds)
    if broken is not None:
        raise ValueError(f"The embedding of class {broken} holds NaN or infinity. Make class_embeds again.")
    device = device_of(clip) if device is None else device
    matrix = exact(class_embeds.to(device))
    if isinstance(projection, nn.Linear):
        matrix = matrix @ exact(weights_of(projection, "weight")[0].to(device))
    if isinstance(norm, nn.Identity):
        return Tail(matrix, matrix.new_zeros(len(matrix)), None)
    weight, bias = (exact(vector.to(device)) for vector in weights_of(norm, "weight", "bias"))
    return Tail(matrix * weight, matrix @ bias, norm.eps)
