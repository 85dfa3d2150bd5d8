"""Configuration of a CLIP with sparse autoencoders plugged in."""

import copy
from dataclasses import field, fields
from typing import Any, ClassVar

from transformers import AutoConfig, CLIPConfig, PreTrainedConfig
from transformers.utils import logging

from ..methods import BEFORE
from .checks import CheckpointConfig, check_clip_config, strict_values
from .sae import SAEConfig
from .steering import Steering


logger = logging.get_logger(__name__)


@strict_values
class VS2CLIPConfig(CheckpointConfig, PreTrainedConfig):
    r"""
    Configuration of [`VS2CLIPForZeroShot`].

    Args:
        clip_config (`CLIPConfig`, `SiglipConfig` or another family's, or `dict`, *optional*): the CLIP.
        sae_configs (`list[SAEConfig]` or list of `dict`, *optional*): one SAE a steered layer, ascending.
        method, gamma, lambda_, gate, fvu_threshold, num_neighbors, positives, edits, coefficient: see [`Steering`].
            `edits` is a `dict` here, and not written where there are none.
        base_model_name_or_path (`str`, *optional*), base_model_revision (`str`, *optional*): where the CLIP comes
            from.
        holds_clip (`bool`, *optional*, defaults to `False`): whether the checkpoint holds the CLIP's weights too
            (full) or only names it (light).
        holds_corpus (`bool`, *optional*, defaults to `False`): whether the checkpoint has a [`RetrievalCorpus`] in its
            subfolder `corpus`.
        holds_statistics (`bool`, *optional*, defaults to `False`), holds_label_sets (`bool`, *optional*, defaults to
            `False`): whether it has [`DomainStatistics`] beside the weights, and what was fitted for label sets.
        digests (`dict[str, str]`, *optional*): digest of each safetensors file that was saved with this configuration;
            `save_pretrained` writes it.
    """

    model_type = "vs2_clip"
    required_fields: ClassVar[tuple[str, ...]] = (
        "model_type",
        "clip_config",
        "sae_configs",
        "method",
        "gamma",
        "lambda_",
        "holds_clip",
    )
    sub_configs: ClassVar[dict[str, Any]] = {"clip_config": AutoConfig}

    clip_config: dict | PreTrainedConfig | None = None
    sae_configs: list = field(default_factory=list)
    method: str = "vs2"
    gamma: int | float | list[float] = 1.5
    lambda_: int | float = 2.1
    gate: float | None = None
    fvu_threshold: int | float | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    holds_clip: bool = False
    num_neighbors: int = 50
    positives: str = "majority"
    holds_corpus: bool = False
    holds_statistics: bool = False
    holds_label_sets: bool = False
    digests: dict[str, str] | None = None
    edits: dict | None = None
    coefficient: int | float = 0.25

    def __post_init__(self, **kwargs: Any) -> None:
        if self.clip_config is None:
            self.clip_config = CLIPConfig(text_config={}, vision_config={})  # `None` would be logged
        elif isinstance(self.clip_config, dict):
            given = dict(self.clip_config)
            self.clip_config = AutoConfig.for_model(given.pop("model_type", "clip"), **given)
        else:
            # A composite config sets the attention implementation of its parts: never on a config that a live model
            # uses.
            self.clip_config = copy.deepcopy(self.clip_config)
        self.sae_configs = [
            SAEConfig(**sae) if isinstance(sae, dict) else copy.deepcopy(sae) for sae in self.sae_configs
        ]
        super().__post_init__(**kwargs)
        self.steering()  # refuses settings that exclude each other

    @property
    def vision_config(self) -> Any:
        """The CLIP's, where code written for `CLIPConfig` looks for it."""
        return getattr(self.clip_config, "vision_config", self.clip_config)

    @property
    def text_config(self) -> Any:
        """Likewise."""
        return self.clip_config.text_config  # type: ignore[union-attr]

    @property
    def projection_dim(self) -> int:
        """Width of the CLIP's embeddings."""
        return getattr(self.clip_config, "projection_dim", self.vision_config.hidden_size)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers. What a file of before `coefficient` calls distribution norm keeps its meaning, and its
        new name."""
        method = config_dict.get("method") if isinstance(config_dict, dict) else None
        if isinstance(method, str) and method in BEFORE and "coefficient" not in config_dict:
            logger.warning(
                f"method={method!r} of a checkpoint saved before is {BEFORE[method]!r} now: it goes on as it was "
                "(docs/migration.md)."
            )
            config_dict = config_dict | {"method": BEFORE[method]}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def check_fields(cls, config_dict: Any) -> None:
        super().check_fields(config_dict)
        if config_dict["model_type"] != cls.model_type:
            raise ValueError(f"model_type={config_dict['model_type']!r} is not {cls.model_type!r}.")
        check_clip_config(config_dict["clip_config"])
        if not isinstance(config_dict["sae_configs"], list):
            raise ValueError("sae_configs must be a list.")
        for place, sae in enumerate(config_dict["sae_configs"]):
            if not isinstance(sae, SAEConfig):
                try:
                    SAEConfig.check_fields(sae)
                except ValueError as error:
                    raise ValueError(f"sae_configs[{place}]: {error}") from error

    def steering(self) -> Steering:
        """The steering settings, validated."""
        given = {name: getattr(self, name) for name in self._steering_fields()}
        return Steering(**given | {"gamma": tuple(self.gamma) if isinstance(self.gamma, list) else self.gamma})

    def set_steering(self, chosen: Steering) -> None:
        """Take over settings, all but `enabled`, as JSON holds them."""
        gamma, edits = chosen.gamma, chosen.edits
        as_json = {"gamma": list(gamma) if isinstance(gamma, tuple) else gamma, "edits": edits and edits.to_dict()}
        for name in self._steering_fields():
            setattr(self, name, as_json.get(name, getattr(chosen, name)))

    def _steering_fields(self) -> list[str]:
        return [setting.name for setting in fields(Steering) if hasattr(self, setting.name)]

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["sae_configs"] = [sae if isinstance(sae, dict) else sae.to_dict() for sae in self.sae_configs]
        if output.get("edits") is None:
            output.pop("edits", None)
        return output
