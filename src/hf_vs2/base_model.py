"""Which CLIP an SAE belongs to: what is recorded of it, and the check that refuses another."""

import torch
from transformers import CLIPModel

from .configuration_sae import SAEConfig


_FINGERPRINT_SIZE = 8


def resolve_layer(layer: int, num_layers: int) -> int:
    """`layer` counted from 0; negative indices count from the end, as in a list.

    Raises:
        `ValueError`: if the tower has no such layer.
    """
    if not -num_layers <= layer < num_layers:
        raise ValueError(
            f"layer={layer} does not exist: the vision tower has {num_layers} layers, 0 to {num_layers - 1}."
        )
    return layer % num_layers


@torch.no_grad()
def vision_fingerprint(clip: CLIPModel) -> list[float]:
    """A few weights of the vision tower, enough to tell one CLIP from another and the same in float32 and bfloat16.

    Evenly spaced entries of the class embedding and of the two layer norms around the encoder: `3 * 8` floats.
    """
    vision = clip.vision_model
    vectors = (vision.embeddings.class_embedding, vision.pre_layrnorm.weight, vision.post_layernorm.weight)
    picks = []
    for vector in vectors:
        step = max(1, len(vector) // _FINGERPRINT_SIZE)
        picks += vector.detach()[::step][:_FINGERPRINT_SIZE].float().tolist()
    return picks


def describe_base_model(clip: CLIPModel) -> dict:
    """The fields of [`SAEConfig`] that name the CLIP: id or path, commit, number of layers, fingerprint."""
    return {
        "base_model_name_or_path": clip.config._name_or_path or None,
        "base_model_revision": getattr(clip.config, "_commit_hash", None),
        "base_model_num_layers": clip.config.vision_config.num_hidden_layers,
        "base_model_fingerprint": vision_fingerprint(clip),
    }


def check_base_model(clip: CLIPModel, config: SAEConfig) -> None:
    """Refuse an SAE that was trained on another CLIP: other width, other depth, or same shape with other weights.

    Raises:
        `ValueError`: naming both models and the difference.
    """
    vision = clip.config.vision_config
    theirs = config.base_model_name_or_path or "a CLIP that its config does not name"
    both = f"This SAE was trained on {theirs}; the CLIP given is {clip.config._name_or_path or 'one without a name'}."
    if config.hidden_size != vision.hidden_size:
        raise ValueError(
            f"{both} Their widths differ: the SAE reads {config.hidden_size} features, the vision tower gives "
            f"{vision.hidden_size}. Load the SAE's own CLIP, or train an SAE for this one."
        )
    if config.base_model_num_layers not in (None, vision.num_hidden_layers):
        raise ValueError(
            f"{both} Their depths differ: {config.base_model_num_layers} layers against {vision.num_hidden_layers}. "
            "Load the SAE's own CLIP, or train an SAE for this one."
        )
    if config.base_model_fingerprint is not None:
        expected = torch.tensor(config.base_model_fingerprint)
        found = torch.tensor(vision_fingerprint(clip))
        # bfloat16 keeps 8 bits: the same weights agree to 0.4 %.
        if expected.shape != found.shape or not torch.allclose(found, expected, rtol=0.01, atol=1e-6):
            raise ValueError(
                f"{both} They have the same shape but not the same weights. Load the SAE's own CLIP, or train an SAE for this "
                "one; if this is a fine-tuned relative on which you want the SAE all the same, set "
                "sae.config.base_model_fingerprint = None first."
            )
