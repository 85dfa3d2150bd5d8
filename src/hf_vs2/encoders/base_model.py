"""Which CLIP an SAE belongs to: what is recorded of it, and the check that refuses another."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import CLIPModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..config.sae import SAEConfig


_FINGERPRINT_SIZE = 8
_FINGERPRINT_WEIGHTS = ("embeddings.class_embedding", "pre_layrnorm.weight", "post_layernorm.weight")


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
    return _entries(clip.vision_model.get_parameter(name) for name in _FINGERPRINT_WEIGHTS)


def _entries(vectors: Iterable[torch.Tensor]) -> list[float]:
    picks = []
    for vector in vectors:
        step = max(1, len(vector) // _FINGERPRINT_SIZE)
        picks += vector.detach()[::step][:_FINGERPRINT_SIZE].float().tolist()
    return picks


def same_fingerprint(left: list[float], right: list[float]) -> bool:
    """Whether two fingerprints are of the same weights, be it in another precision."""
    # bfloat16 keeps 8 bits: the same weights agree to 0.4 %.
    return len(left) == len(right) and torch.allclose(torch.tensor(left), torch.tensor(right), rtol=0.01, atol=1e-6)


def loaded_revision(clip: Any, cache_dir: str | os.PathLike | None = None) -> str | None:
    """The commit that a CLIP was loaded from; `None` if it came from a folder, or if nothing tells.

    transformers noted it in the config up to 5.17. Since then it is the commit in the cache whose weights these are; `main`'s
    where those are in a format that we do not open.

    Args:
        clip (`CLIPModel`, or anything with its `config` and `vision_model`): the model.
        cache_dir (path, *optional*): the cache it was loaded through.
    """
    noted, name = getattr(clip.config, "_commit_hash", None), clip.config._name_or_path
    if noted is not None or not name or os.path.isdir(name):
        return noted
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    folder = Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    main = folder / "refs" / "main"
    newest = main.read_text().strip() if main.is_file() else None
    commits = sorted((path.name for path in folder.glob("snapshots/*")), key=lambda commit: commit != newest)
    fingerprint = vision_fingerprint(clip)
    stored = {commit: _stored_fingerprint(folder / "snapshots" / commit / SAFE_WEIGHTS_NAME) for commit in commits}
    for commit, found in stored.items():
        if found is not None and same_fingerprint(found, fingerprint):
            return commit
    return newest if newest in stored and stored[newest] is None else None


def _stored_fingerprint(path: Path) -> list[float] | None:
    if not path.is_file():
        return None
    names = [f"vision_model.{name}" for name in _FINGERPRINT_WEIGHTS]
    try:
        with safe_open(path, framework="pt") as weights:
            if not set(names) <= set(weights.keys()):
                return None
            return _entries(weights.get_tensor(name) for name in names)
    except SafetensorError:
        return None  # a damaged file is not the one that the model came from


def describe_base_model(clip: CLIPModel) -> dict:
    """The fields of [`SAEConfig`] that name the CLIP: id or path, commit, number of layers, fingerprint."""
    return {
        "base_model_name_or_path": clip.config._name_or_path or None,
        "base_model_revision": loaded_revision(clip),
        "base_model_num_layers": clip.vision_model.config.num_hidden_layers,
        "base_model_fingerprint": vision_fingerprint(clip),
    }


def check_base_model(clip: CLIPModel, config: SAEConfig) -> None:
    """Refuse an SAE that was trained on another CLIP: other width, other depth, or same shape with other weights.

    Raises:
        `ValueError`: naming both models and the difference.
    """
    vision = clip.vision_model.config
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
    recorded = config.base_model_fingerprint
    if recorded is not None and not same_fingerprint(vision_fingerprint(clip), recorded):
        raise ValueError(
            f"{both} They have the same shape but not the same weights. Load the SAE's own CLIP, or train an SAE for this "
            "one; if this is a fine-tuned relative on which you want the SAE all the same, set "
            "sae.config.base_model_fingerprint = None first."
        )
