"""Configs read from a `config.json` that anybody may have written, or a bad disk changed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.utils import CONFIG_NAME

from .packaged_code import PackagedCode
from .schema import shown


_Config = TypeVar("_Config")


# By these transformers opens other files, or fetches kernels, which are code. No checkpoint of ours has them.
_OPENS_OTHERS = (
    "quantization_config",
    "transformers_weights",
    "fusion_config",
    "kernel_config",
    "configuration_files",
)
OF_OTHERS = ("quantization_config", "configuration_files")
"""Of these, what another library's model may have: it may be quantised, and have one configuration for each version of
transformers."""
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
# Code that is here. For all others, "flash_attention_2" among them, transformers may fetch a kernel from a repository.
_PACKAGED = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
_LARGEST_SIZE = 999_999
"""No CLIP has so many layers, features or words."""
_DTYPES = ("float16", "bfloat16", "float32", "float64")
# Attributes of transformers' configs that its files hold, but that are no field of theirs.
_NO_FIELDS = ("model_type", "_name_or_path", "name_or_path", "num_labels", "output_attentions", "torch_dtype")


def strict_values(cls: type[_Config]) -> type[_Config]:
    """`huggingface_hub`'s `strict`, whose refusal of a value of another kind than its field's is a `ValueError` here,
    in one line."""
    cls = strict(cls)
    set_checked = cls.__setattr__

    def __setattr__(self: _Config, name: str, value: Any) -> None:
        try:
            set_checked(self, name, value)
        except StrictDataclassFieldValidationError as error:
            kind = cls.__annotations__.get(name, "what transformers takes")
            raise ValueError(
                f"{name}={shown(value)} must be of the kind {getattr(kind, '__name__', kind)}."
            ) from error

    cls.__setattr__ = __setattr__  # type: ignore[method-assign, assignment]
    return cls


def read_config_dict(
    read: Callable[..., tuple[dict[str, Any], dict[str, Any]]], name_or_path: str | os.PathLike, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What transformers' `get_config_dict` gives; an `OSError` without such a file, or an empty one, and a
    `ValueError` if there is no JSON object in it."""
    try:
        config, others = read(name_or_path, **kwargs)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        # What transformers meets where it takes a JSON object for granted.
        raise ValueError(f"{CONFIG_NAME} of {name_or_path} is not the configuration of a model: {error}.") from error
    if not config:
        where = f" in subfolder {kwargs['subfolder']!r}" if kwargs.get("subfolder") else ""
        raise OSError(
            f"{name_or_path} has no {CONFIG_NAME}{where}, or an empty one. If it holds several models, name one "
            "with subfolder=."
        )
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG_NAME} of {name_or_path} is not a JSON object.")
    return config, others


class CheckpointConfig(PackagedCode):
    """
    A config class whose files are refused in one message, with the file and the field, before anything is built from
    them.

    Put it before `PreTrainedConfig` among the bases. An unknown field is kept: a later version may have added it.
    """

    required_fields: ClassVar[tuple[str, ...]] = ("model_type",)
    """Fields that every file has held from the first version on; a default in place of one that was lost is another
    model."""

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers; refused by [`read_config_dict`]."""
        return read_config_dict(super().get_config_dict, pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """As in transformers. A file that can't be used is a `ValueError` that names it and the field."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        except ValueError as error:
            if str(pretrained_model_name_or_path) in str(error):
                raise
            raise ValueError(f"{CONFIG_NAME} of {pretrained_model_name_or_path} can't be used. {error}") from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers. What is no configuration of this class is a `ValueError` that names the field."""
        cls.check_fields(config_dict)
        # What leads `trust_remote_code=True` to the shim beside the file: no part of the model.
        config_dict = {name: value for name, value in config_dict.items() if name != "auto_map"}
        try:
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        except ValueError:
            raise
        except Exception as error:  # a value of the wrong kind fails in many ways, most of them inside transformers
            raise ValueError(f"A field has a value that can't be used: {' '.join(str(error).split())}") from error

    @classmethod
    def check_fields(cls, config_dict: Any) -> None:
        """Refuse, by a `ValueError` with the field, a dictionary that lacks fields, or asks for more than a
        configuration may."""
        if not isinstance(config_dict, Mapping):
            raise ValueError(f"A configuration is a JSON object, not {type(config_dict).__name__}.")
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        for name in config_dict:
            if name not in known and name not in _NO_FIELDS and hasattr(cls, name):
                raise ValueError(f"The field {name!r} would replace a part of {cls.__name__} itself.")
        missing = [name for name in cls.required_fields if name not in config_dict]
        if missing:
            raise ValueError(f"The field {missing[0]!r} is missing.")
        refuse_requests(config_dict)


def refuse_requests(config: Any, allowed: tuple[str, ...] = ()) -> None:
    """Refuse, by a `ValueError` with the field, a configuration, or one of its parts, by which transformers would open
    other files or run other code. Fields of `_OPENS_OTHERS` may be `allowed`."""
    for name, value in _entries(config):
        texts = {text for _, text in _entries({"": value}) if isinstance(text, str)}
        code = any(part in name for part in _IMPLEMENTATIONS) and texts - set(_PACKAGED)
        if code or (name in _OPENS_OTHERS and name not in allowed and value is not None):
            raise ValueError(f"The field {name!r} ({value!r}) asks for other files or code, which is not loaded.")
        if name in ("dtype", "torch_dtype") and value is not None and value not in _DTYPES:
            raise ValueError(f"{name}={value!r} is not a type of weights. Expected one of {list(_DTYPES)}.")


def check_clip_config(config: Any) -> None:
    """Refuse, by a `ValueError` with the field, the configuration of a CLIP that asks for other files or code, or for
    sizes that no CLIP has."""
    refuse_requests(config, OF_OTHERS)
    for name, value in _entries(config):
        if isinstance(value, int) and abs(value) > _LARGEST_SIZE:
            raise ValueError(f"The field {name!r} is {str(value)[:20]}, and nothing in a CLIP is so large.")


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every name and value of nested JSON."""
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield str(name), value
            yield from _entries(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _entries(value)
