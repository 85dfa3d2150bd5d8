"""The families of encoders that can be steered, and the refusal of all others."""

from transformers.utils import CONFIG_NAME

from ..files.json_files import read_object
from ..files.place import look_for


STEERABLE = ("clip",)
"""`model_type` of the models that can be steered."""
_TOWERS = ("clip_vision_model",)
"""`model_type` of their vision towers, where these are a model of their own: CLS rows can be extracted from one in
memory."""


def refuse_family(model_type: str | None, where: str, tower: bool = False) -> None:
    """
    Args:
        model_type: of a model's configuration.
        where: what the message names.
        tower: whether a vision tower alone will do.

    Raises:
        `ValueError`: if nothing can steer such a model yet.
    """
    if model_type not in STEERABLE and not (tower and model_type in _TOWERS):
        raise ValueError(
            f"{where} holds a model of type {model_type!r}; expected a CLIP ({', '.join(map(repr, STEERABLE))}). No "
            "other family can be steered yet."
        )


def recorded_family(name: str, revision: str | None) -> str | None:
    """The `model_type` of a model that a file names, without asking the Hub; `None` where its configuration is not
    here."""
    try:
        path = look_for(name, CONFIG_NAME, {"revision": revision or "main", "local_files_only": True})
        return None if path is None else read_object(path).get("model_type")
    except (OSError, ValueError):
        return None


__all__ = ["STEERABLE", "recorded_family", "refuse_family"]
