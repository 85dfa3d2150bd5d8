"""CLIP with Visual Sparse Steering plugged in: any `CLIPModel` plus one SAE a steered layer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from ..config.sae import SAEConfig
from ..config.steering import Steering, changed
from ..config.vs2_clip import VS2CLIPConfig
from ..encoders.base_model import loaded_revision
from ..encoders.families import FAMILIES, family_of, refuse_without_texts
from ..encoders.processing import save_processing
from ..encoders.tail import at_temperature, is_sigmoid, plain_outputs
from ..encoders.wrapped import unwrapped, weights_of
from ..files.checkpoint_folder import CORPUS_FOLDER
from ..files.place import HUB_ARGUMENTS, at_one_commit, one_dtype
from ..files.progress import without_loading_bars
from ..files.sharing.hub import HubMixin
from ..sae.modeling import SAEModel
from ..sae.statistics import DomainStatistics
from ..steering.corpus_search import RetrievalInputs, pop_retrieval_inputs
from ..steering.label_sets import LabelSets
from ..steering.outputs import VS2CLIPOutput, VS2ImageFeatures, per_image
from ..steering.steerer import Steerer
from .embeddings import EmbeddingMixin
from .loading import (
    at_layer,
    check_widths,
    clip_of,
    default_gate,
    layer_of,
    load_corpus,
    load_full,
    load_saes,
    options_of,
    refuse_adapters,
    refuse_quantised,
    saes_by_layer,
    saved_full,
)


logger = logging.get_logger(__name__)


class VS2CLIPForZeroShot(EmbeddingMixin, HubMixin, PreTrainedModel):
    """
    Wraps a CLIP and the SAEs trained on it; everything that CLIP computes from an image is steered.

    Steering touches the CLS row alone. For the last layer that is the input of `vision_model.post_layernorm`; for
    others, the output of the encoder layer. The CLIP given is used as it is: no hook, no copy, no weight changed, so
    it goes on giving its own results when called directly.

    Args:
        clip (`CLIPModel`): the model to steer.
        sae (`SAEModel` or `dict[int, SAEModel]`): the SAE, for the layer that its config names (the last one if it
            names none), or one SAE a layer.
        gamma (`float` or one a latent), lambda_ (`float`), gate (`float`, *optional*), method (`str`), fvu_threshold
            (`float`, *optional*), num_neighbors (`int`), positives (`str`): see [`Steering`].

    Raises:
        `ValueError`: if an SAE was trained on another CLIP, or settings exclude each other.

    Example:

    ```python
    >>> model = VS2CLIPForZeroShot(clip, sae, gamma=1.5, lambda_=2.1, gate=0.99)
    >>> out = model(**processor(text=prompts, images=images, return_tensors="pt", padding=True))
    >>> out.logits_per_image, out.fvu, out.steered
    >>> with model.steering(enabled=False):
    ...     plain = model(**inputs)  # CLIP's own result, bit for bit
    ```
    """

    config_class = VS2CLIPConfig
    base_model_prefix = "vs2"
    main_input_name = "input_ids"  # as CLIPModel's
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", "CLIPVisionEmbeddings", "SAEModel"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    config: VS2CLIPConfig

    def __init__(
        self,
        clip: CLIPModel | VS2CLIPConfig,
        sae: SAEModel | Mapping[int, SAEModel] | None = None,
        gamma: float | torch.Tensor | list[float] = 1.5,
        lambda_: float = 2.1,
        gate: float | None = None,
        method: str = "vs2",
        **settings: Any,
    ):
        if isinstance(clip, VS2CLIPConfig):
            given = {"gamma": gamma, "lambda_": lambda_, "gate": gate, "method": method}
            beside = [name for name, value in given.items() if repr(value) != repr(getattr(Steering, name))]
            if sae is not None or beside or settings:
                raise TypeError(
                    "VS2CLIPForZeroShot(config) takes SAEs and settings from the config alone, not "
                    f"{', '.join([*beside, *settings] or ['sae'])}: set them there, or by set_steering()."
                )
            config = clip
            own: Any = config.clip_config
            clip = FAMILIES[own.model_type].model._from_config(own)
            saes = {layer_of(sae_config, clip): SAEModel(sae_config) for sae_config in config.sae_configs}
            check_widths(saes, clip)
            chosen = config.steering()
        else:
            clip = unwrapped(clip)
            saes = saes_by_layer(clip, sae)
            given = {"gamma": gamma, "lambda_": lambda_, "gate": gate, "method": method}
            chosen = changed(Steering(), given | settings)
            config = VS2CLIPConfig(
                clip_config=clip.config,
                sae_configs=[saes[layer].config for layer in sorted(saes)],
                base_model_name_or_path=clip.config._name_or_path or None,
                base_model_revision=loaded_revision(clip),
                dtype=clip.dtype,
            )
        super().__init__(config)
        self.loaded_from: dict[str, Any] = {}  # cache_dir, revision and so on: the processors are looked for there too
        self.clip = clip
        self.saes = nn.ModuleDict({str(layer): saes[layer] for layer in sorted(saes)})
        self.post_init()
        self._use(Steerer(clip, self.sae_by_layer, chosen, LabelSets()))
        if sae is not None:  # from a configuration: what settings need of a checkpoint is still to come
            self._steerer.check()
        self.config.set_steering(chosen)
        self.config.clip_config = clip.config  # what is set of the one, such as its attention, holds for the other
        self.training = clip.training  # `self.train(...)` would set the mode of each part of the CLIP

    @classmethod
    @without_loading_bars()
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        clip: nn.Module | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Load a VS2 checkpoint, light or full, or a bare SAE checkpoint: one id or path is enough.

        A light VS2 checkpoint and an SAE checkpoint name their CLIP, which is loaded from its own repository at the
        recorded revision. An SAE checkpoint brings its default steering with it; if it is not calibrated it is used
        without a gate.

        Args:
            pretrained_model_name_or_path (`str` or path): Hub id or folder.
            clip (`CLIPModel` or `str`, *optional*): the CLIP to use instead of the one named, as a model, an id or a
                path.
            kwargs: settings of [`Steering`] to use instead of the stored ones; and, as for any transformers model,
                `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`, `dtype`,
                `device_map`, `attn_implementation`, `output_loading_info`. `revision` and `subfolder` belong to the
                checkpoint, not to the CLIP it names. A `device_map` by names of modules has `"clip"` and `"saes"`.

        Raises:
            `ValueError`: if the checkpoint is something else, names no CLIP, or `clip` is not the one it was trained
                on.
            `OSError`: if files are missing or can't be reached.
        """
        source = pretrained_model_name_or_path
        if source is None:  # the weights are given as state_dict=
            return super().from_pretrained(None, *model_args, **kwargs)
        kwargs = one_dtype(kwargs)
        with_info = kwargs.pop("output_loading_info", False)
        found = kwargs.pop("config", None)
        place = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        settings = {name: kwargs.pop(name) for name in Steering.__dataclass_fields__ if name in kwargs}
        place = at_one_commit(source, place)
        config_dict, _ = VS2CLIPConfig.get_config_dict(source, **place)
        model_type, digests = config_dict.get("model_type"), config_dict.get("digests")
        if model_type not in (VS2CLIPConfig.model_type, SAEConfig.model_type):
            raise ValueError(
                f"{source} holds a model of type {model_type!r}; expected a VS2 checkpoint "
                f"({VS2CLIPConfig.model_type!r}) or an SAE checkpoint ({SAEConfig.model_type!r}). To steer a CLIP you "
                "need an SAE trained on it: VS2CLIPForZeroShot(clip, sae)."
            )
        if model_type == SAEConfig.model_type:
            part = f"saes.{config_dict.get('layer')}"
            sae = SAEModel.from_pretrained(source, **place, **options_of(part, kwargs))
            own = {name: getattr(sae.config, name) for name in ("gamma", "lambda_", "method")}
            model = cls(clip_of(clip, sae.config, source, place, kwargs), sae, gate=default_gate(sae), **own)
        else:
            config = found or VS2CLIPConfig.from_pretrained(source, **place)
            if config_dict.get("holds_clip") and clip is None:
                model = load_full(super().from_pretrained, source, config, place, kwargs)
            else:
                # The dtype of the checkpoint, not of the repository its CLIP lies in: as if the weights were here.
                # Older Auto classes hand on a dtype that was asked for in the config alone.
                asked = {} if kwargs.get("dtype", "auto") != "auto" else {"dtype": config.dtype or "auto"}
                base = clip_of(clip, config, source, place, kwargs | asked)
                model = cls(base, load_saes(source, config, place, kwargs))
                model._use(replace(model._steerer, settings=config.steering()))
        if config_dict.get("holds_corpus"):
            model.set_corpus(load_corpus(source, place, digests))
        if model_type == VS2CLIPConfig.model_type and config_dict.get("holds_statistics"):
            statistics = DomainStatistics.load(source, place, digests)
            if statistics is not None:
                num_latents, hidden_size = model.sae.config.weight_shape
                statistics.check_fits(hidden_size, num_latents, str(source))
            model.sae.set_domain_statistics(statistics)
        if config_dict.get("holds_label_sets"):
            label_sets = LabelSets.load(source, place, digests, model._steerer)
            model._use(replace(model._steerer, label_sets=label_sets))
        if not settings and model._steerer.lacks_rows:
            # Versions before ran distribution norm under that name. It loads, and refuses to score.
            logger.warning(f"{source}: {model._steerer.lacking_rows}")
        else:
            try:
                model.set_steering(**settings)  # without any, a look at whether those stored can be used
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
        model.loaded_from = {name: value for name, value in place.items() if name not in ("token", "force_download")}
        # All weights are there and fit, or nothing was loaded.
        nothing: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return (model, nothing | {"error_msgs": []}) if with_info else model

    def save_pretrained(self, save_directory: str | os.PathLike, *, full: bool | None = None, **kwargs: Any) -> None:
        """
        Save a VS2 checkpoint: light (the SAEs, the settings and the name of the CLIP) or `full` (the CLIP's weights
        too). The CLIP's tokenizer and image processor are saved beside, so that `pipeline(...)` needs no other id; and
        the corpus, if there is one, in the subfolder `corpus`. What the folder held of an earlier checkpoint goes, in
        one step.

        Args:
            full (`bool`, *optional*): by default a light checkpoint, unless the CLIP came from nowhere that could be
                named, its weights or settings are not those of the one that it names, or that one can't be read here.

        Raises:
            `ValueError`: if a light checkpoint is asked for and the CLIP came from nowhere that could be named, or has
                other weights; on NaN, and on layers of an adapter that was not merged.
        """
        state = kwargs.pop("state_dict", None) or self.state_dict()
        refuse_adapters(state, self.config)
        full = saved_full(state, self.config, full, self.loaded_from.get("cache_dir"))
        if full:
            refuse_quantised(state)
        self.config.set_steering(self._steerer.settings)  # which are in force, whatever was written into the config
        self.config.holds_clip, self.config.holds_corpus = full, self.corpus is not None
        self.config.holds_statistics = self.domain_statistics is not None
        self.config.holds_label_sets = bool(self.fitted_label_sets)
        # As they are now (calibrated since, perhaps), each with the layer that it steers.
        self.config.sae_configs = [at_layer(sae.config, layer) for layer, sae in self.sae_by_layer.items()]
        if not full:
            state = {name: tensor for name, tensor in state.items() if name.startswith("saes.")}
        super().save_pretrained(save_directory, state_dict=state, **kwargs)

    def save_beside(self, folder: Path, **kwargs: Any) -> None:
        """Write what is kept in files of its own: tokenizer and image processor, corpus, statistics, label sets."""
        name = self.config.base_model_name_or_path
        if name is not None:
            cache = {"cache_dir": self.loaded_from["cache_dir"]} if "cache_dir" in self.loaded_from else {}
            save_processing(name, self.config.base_model_revision, folder, **cache | kwargs)
        if self.corpus is not None:
            self.corpus.save_pretrained(folder / CORPUS_FOLDER)
        if self.domain_statistics is not None:
            self.domain_statistics.save(folder)
        if self.config.holds_label_sets:
            self._steerer.label_sets.save(folder)

    # CLIP's interface

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """`CLIPModel.get_image_features`, steered: `pooler_output` `(batch, projection_dim)` is projected, not
        normalised.

        `method="vs2++"` needs `class_embeds=`, and may need `retrieval_embeds=` and `exclude=`: see
        [`RetrievalInputs`].
        """
        retrieval = pop_retrieval_inputs(kwargs)
        if interpolate_pos_encoding is not None:
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        if not self.steerer.is_steering:
            return plain_outputs(self.clip, pixel_values=pixel_values, **kwargs)
        outputs, *_ = self.steerer.vision(pixel_values, retrieval, **kwargs)
        outputs.pooler_output = family_of(self.clip).projection(self.clip)(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """`CLIPModel.get_text_features`, untouched: steering moves images only."""
        refuse_without_texts(self.clip)
        return self.clip.get_text_features(*args, **kwargs)

    def image_features(
        self, pixel_values: torch.Tensor, *, with_plain: bool = False, **kwargs: Any
    ) -> VS2ImageFeatures:
        """`get_image_features` with what steering did to each image; shapes as in [`VS2CLIPOutput`] for several SAEs.

        `with_plain=True` adds plain CLIP's features, bit for bit. They cost nothing while only the last layer is
        steered, since they start from the same CLS row, and a second pass through the vision tower otherwise.
        `class_embeds=` and the other [`RetrievalInputs`] are for `method="vs2++"`.
        """
        return self.steerer.features(pixel_values, with_plain, pop_retrieval_inputs(kwargs), **kwargs)

    def image_features_from_cls(self, rows: torch.Tensor, **retrieval: Unpack[RetrievalInputs]) -> VS2ImageFeatures:
        """The tail of the model on cached CLS rows `(batch, hidden_size)` of the last layer: steer, `post_layernorm`,
        project.

        Equal to running the whole model on the images those rows came from. `features` is `(batch, projection_dim)`.
        `class_embeds=` and the other [`RetrievalInputs`] are for `method="vs2++"`.

        Raises:
            `ValueError`: if an inner layer is steered (its effect on the layers above can't be replayed), or on other
                widths.
        """
        return self.steerer.features_from_cls(rows, **retrieval)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> VS2CLIPOutput:
        """`CLIPModel.forward` with the image side steered; same arguments. Returns a [`VS2CLIPOutput`].

        With `method="vs2++"`, and methods that score by a label set, the texts are the classes: one prompt a class.
        The former may need `retrieval_embeds=` and `exclude=`: see [`RetrievalInputs`].
        """
        retrieval = pop_retrieval_inputs(kwargs)
        refuse_without_texts(self.clip)
        text_inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        image_inputs: dict[str, Any] = {"pixel_values": pixel_values}
        if interpolate_pos_encoding is not None:  # the default is the family's
            image_inputs["interpolate_pos_encoding"] = interpolate_pos_encoding
        steerer = self.steerer
        if not steerer.is_steering:
            plain = self.clip(**text_inputs, **image_inputs, return_loss=return_loss, **kwargs)
            nothing = torch.zeros(plain.image_embeds.shape[0], dtype=torch.bool, device=plain.image_embeds.device)
            return VS2CLIPOutput(**plain, steered=nothing)

        text_outputs = None
        if steerer.settings.rule.needs_corpus:
            text_outputs = self.clip.get_text_features(**text_inputs, **kwargs)
            retrieval.setdefault("class_embeds", text_outputs.pooler_output)
        vision_outputs, done, _ = steerer.vision(**image_inputs, retrieval=retrieval, **kwargs)
        family = family_of(self.clip)
        vision_outputs.pooler_output = family.projection(self.clip)(vision_outputs.pooler_output)
        if text_outputs is None:
            text_outputs = self.clip.get_text_features(**text_inputs, **kwargs)
        image_embeds = family.unit(vision_outputs.pooler_output)
        text_embeds = family.unit(text_outputs.pooler_output)
        # The same operations in the same order as CLIPModel.forward: a row the gate held back must come out
        # bit-identical.
        logits_per_text = torch.matmul(text_embeds, image_embeds.t().to(text_embeds.device))
        (logit_scale,) = weights_of(self.clip, "logit_scale")
        logits_per_text = logits_per_text * logit_scale.exp().to(text_embeds.device)
        if is_sigmoid(self.clip):
            logits_per_text = logits_per_text + weights_of(self.clip, "logit_bias")[0].to(text_embeds.device)
        if steerer.settings.rule.fit is not None:
            (made,) = done.values()
            images = VS2ImageFeatures(vision_outputs.pooler_output, steered=made.steered, views=made.views)
            classes = text_embeds.float()
            embeds = F.normalize(vision_outputs.pooler_output.float(), dim=-1).to(classes.device)
            scored = at_temperature(self.clip, steerer.scores(images, embeds, classes)).t().to(logits_per_text.dtype)
            logits_per_text = torch.where(made.steered.to(scored.device), scored, logits_per_text)
        return VS2CLIPOutput(
            loss=family.loss(logits_per_text) if return_loss else None,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
            **per_image(done),
        )
