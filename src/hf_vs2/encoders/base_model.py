"""Which CLIP an SAE belongs to: what is recorded of it, and the checks that refuse another and warn of a relative."""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers import CLIPModel
from transformers.utils import SAFE_WEIGHTS_NAME

from ..config.sae import SAEConfig
from ..files.place import is_hub_id
from ..files.weight_files import opened
from .families import family_of, tower_of
from .fingerprints import adapter_weight, entries, other_weight, same_fingerprint, vision_fingerprint, weight_samples


def resolve_layer(layer: int, num_layers: int) -> int:
    """`layer` counted from 0; negative indices count from the end, as in a list. Others are a `ValueError`."""
    if not -num_layers <= layer < num_layers:
        raise ValueError(
            f"layer={layer} does not exist: the vision tower has {num_layers} layers, 0 to {num_layers - 1}."
        )
    return layer % num_layers


def loaded_revision(clip: Any, cache_dir: str | os.PathLike | None = None) -> str | None:
    """The commit that a CLIP was loaded from; `None` if it came from a folder, or if nothing tells.

    transformers noted it in the config up to 5.17. Since then it is the commit in the cache whose weights these are;
    `main`'s where those are in a format that we do not open."""
    noted, name = getattr(clip.config, "_commit_hash", None), clip.config._name_or_path
    if noted is not None or not name or os.path.isdir(name) or not is_hub_id(name):
        return noted
    folder = Path(cache_dir or constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    main = folder / "refs" / "main"
    newest = main.read_text().strip() if main.is_file() else None
    commits = sorted((path.name for path in folder.glob("snapshots/*")), key=lambda commit: commit != newest)
    fingerprint = vision_fingerprint(clip)
    prefix = "vision_model." if hasattr(clip, "vision_model") else ""
    names = [f"{prefix}{name}" for name in family_of(tower_of(clip)).fingerprint]
    stored = {commit: _stored_fingerprint(folder / "snapshots" / commit, names) for commit in commits}
    same = (commit for commit, known in stored.items() if known is not None and same_fingerprint(known, fingerprint))
    return next(same, newest if newest in stored and stored[newest] is None else None)


def _stored_fingerprint(snapshot: Path, names: list[str]) -> list[float] | None:
    try:
        with opened(snapshot / SAFE_WEIGHTS_NAME) as weights:
            return entries([weights.get_tensor(name) for name in names])
    except (OSError, ValueError):
        return None  # a damaged file, or one without these names, is not the one that the model came from


def describe_base_model(clip: CLIPModel) -> dict:
    """The fields of [`SAEConfig`] that name the CLIP: id or path, commit, number of layers, and two marks of its
    weights."""
    return {
        "base_model_name_or_path": clip.config._name_or_path or None,
        "base_model_revision": loaded_revision(clip),
        "base_model_type": clip.config.model_type,
        "base_model_num_layers": tower_of(clip).config.num_hidden_layers,
        "base_model_fingerprint": vision_fingerprint(clip),
        "base_model_weights": weight_samples(clip),
        "site": family_of(tower_of(clip)).site,
    }


def check_base_model(clip: CLIPModel, config: SAEConfig) -> None:
    """Refuse an SAE that was trained on another CLIP (other width, other depth, or same shape with other weights), by
    a `ValueError` with both and the difference. Of a relative, with most weights the same, it warns."""
    vision = tower_of(clip).config
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
    site = family_of(tower_of(clip)).site
    if config.site != site:
        raise ValueError(
            f"{both} The SAE reads the {config.site!r} row, and the row that is steered in this model is the {site!r} "
            "one. Train an SAE for it."
        )
    recorded = config.base_model_fingerprint
    if recorded is not None and not same_fingerprint(vision_fingerprint(clip), recorded):
        raise ValueError(
            f"{both} They have the same shape but not the same weights. Load the SAE's own CLIP, or train an SAE for "
            "this one; if this is a fine-tuned relative on which you want the SAE all the same, set "
            "sae.config.base_model_fingerprint = None first."
        )
    warn_of_relative(clip, config.base_model_weights, f"This SAE was trained on {theirs}")


def warn_of_relative(clip: CLIPModel, recorded: Mapping[str, str] | None, what: str) -> None:
    """A `UserWarning`, which begins with `what`, if some weights of `clip` are not those that [`weight_samples`]
    recorded; an earlier version recorded nothing (`None`)."""
    if recorded is None:
        return
    adapter, other = adapter_weight(clip), other_weight(clip, recorded)
    if adapter is None and other is None:
        return
    if adapter is not None:
        how = f"with an adapter inside ({adapter}), whose weights change what it gives"
    elif other is not None and other.startswith("vision_model."):
        how = f"some of whose weights are others ({other} is one): it was fine-tuned, or a LoRA was merged into it"
    else:
        how = (
            f"which differs from it outside the vision tower ({other} is one of its other weights): its image rows "
            "are the same, its class scores are not"
        )
    warnings.warn(
        f"{what}; the CLIP given is {clip.config._name_or_path or 'one without a name'}, {how}. What was measured "
        "on the one need not hold on the other: use the CLIP itself, or train (at the least calibrate) again on this "
        "one.",
        stacklevel=3,
    )
