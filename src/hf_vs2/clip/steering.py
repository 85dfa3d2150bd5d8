"""What a user sets and asks of a steered CLIP beside running it: settings, corpus, statistics, label sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, Unpack, cast

import torch
from torch import nn
from transformers import CLIPModel

from ..config.latent_edits import LatentEdits
from ..config.steering import Steering
from ..config.vs2_clip import VS2CLIPConfig
from ..data.inputs import DEFAULT_TEMPLATES
from ..data.labels.lists import names_in
from ..data.labels.names import clean_class_names
from ..data.labels.prompts import class_embeddings
from ..encoders.families import family_of, tower_of
from ..explain.explanation import VS2Explanation, explain_rows
from ..explain.inputs import explain_images, resolve_names
from ..sae.modeling import SAEModel
from ..sae.statistics import DomainStatistics
from ..steering.corpus import RetrievalCorpus
from ..steering.corpus_search import CorpusSearch, RetrievalInputs
from ..steering.label_sets import FittedLabels
from ..steering.outputs import VS2ImageFeatures
from ..steering.steerer import Steerer
from .loading import processing_of


# The steering of `with model.steering(...)` blocks that this thread or task is in, by model.
_BLOCKS: ContextVar[Mapping[int, Steerer]] = ContextVar("hf_vs2_steering_blocks", default=MappingProxyType({}))


class SteeringMixin:
    """Of [`VS2CLIPForZeroShot`]: everything but loading, saving, and CLIP's own interface."""

    clip: CLIPModel
    saes: nn.ModuleDict
    config: VS2CLIPConfig
    _steerer: Steerer

    @property
    def steerer(self) -> Steerer:
        """What steers, with the settings in force: those of the innermost `with model.steering(...)` of this thread or
        task, else those of [`VS2CLIPForZeroShot.set_steering`]. It never changes, and `steerer.with_(...)` gives
        another."""
        # Compiled code can't ask which context it runs in: it takes the settings that were set last.
        steerer = self._latest if torch.compiler.is_compiling() else _BLOCKS.get().get(id(self), self._steerer)
        if steerer.clip is not self.clip or steerer.saes != self.sae_by_layer:  # a replica of `DataParallel`, say
            steerer = replace(steerer, clip=self.clip, saes=self.sae_by_layer)
        return steerer

    @property
    def sae(self) -> SAEModel:
        """The SAE of the deepest steered layer."""
        return list(self.sae_by_layer.values())[-1]

    @property
    def sae_by_layer(self) -> dict[int, SAEModel]:
        """The SAEs by layer index, ascending."""
        return {int(layer): cast(SAEModel, sae) for layer, sae in self.saes.items()}

    @property
    def num_layers(self) -> int:
        """Layers of the vision tower."""
        return tower_of(self.clip).config.num_hidden_layers

    # Settings

    def set_steering(self, **settings: Any) -> None:
        """Change settings of [`Steering`] (`method`, `gamma`, `lambda_`, `gate`, ...); what is not named stays.

        Giving `gate` drops an earlier `fvu_threshold`, and the other way round. Written to the config, so that
        `save_pretrained` keeps it. Not for threads that share the model: they take `with model.steering(...)`.

        Raises:
            `TypeError`: on an unknown name. `ValueError`: on a value that can't be used with these SAEs.
                `RuntimeError`: inside a `with model.steering(...)`, whose settings would hide these.
        """
        self._use(self._steerer.with_(**settings))
        self.config.set_steering(self._steerer.settings)

    def _use(self, steerer: Steerer) -> None:
        if id(self) in _BLOCKS.get():
            raise RuntimeError(
                "This is inside `with model.steering(...)`, whose settings would hide what is set now: leave the "
                "block first, or begin another block in it."
            )
        self._steerer = self._latest = steerer

    @contextmanager
    def steering(self, **settings: Any) -> Iterator[Self]:
        """The same for the length of a `with` block: `with model.steering(enabled=False): ...` is plain CLIP.

        The settings hold in the thread or asyncio task that the block is in, and for nobody else.
        """
        self._latest = self.steerer.with_(**settings)
        token = _BLOCKS.set({**_BLOCKS.get(), id(self): self._latest})
        try:
            yield self
        finally:
            _BLOCKS.reset(token)
            self._latest = self.steerer

    def editing(
        self,
        amplify: Mapping[int, float] | None = None,
        suppress: Iterable[int] = (),
        set: Mapping[int, float] | None = None,
    ) -> AbstractContextManager[Self]:
        """Latents changed by hand for the length of a `with` block, in place of any other edits.

        ```python
        >>> with model.editing(amplify={17: 3.0}, suppress=[4, 9], set={23: 1.5}):
        ...     model(**inputs)
        ```

        They come on top of the steering in force (`model.set_steering(gamma=1)` leaves the edits alone at work), the
        norm is kept, and an image that the gate holds back has plain CLIP's result. `set_steering(edits=...)` keeps
        edits, in checkpoints too.

        Args:
            amplify, suppress, set: see [`LatentEdits`].
        """
        return self.steering(edits=LatentEdits(amplify or {}, tuple(suppress), set or {}))

    @property
    def steering_settings(self) -> Steering:
        """The settings in force."""
        return self.steerer.settings

    @property
    def fvu_thresholds(self) -> dict[int, float | None]:
        """The gate's threshold tau at each steered layer; `None` where nothing is gated."""
        return dict(self.steerer.fvu_thresholds)

    @property
    def corpus(self) -> RetrievalCorpus | None:
        """The corpus that `method="vs2++"` takes neighbours from."""
        return None if self._steerer.search is None else self._steerer.search.corpus

    def set_corpus(self, corpus: RetrievalCorpus | None) -> None:
        """Give the model an unlabelled corpus for `method="vs2++"`, or with `None` take it away. `save_pretrained`
        keeps it.

        Raises:
            `ValueError`: if it was made with another CLIP.
        """
        if corpus is not None:
            corpus.check_base_model(self.clip)
        self._use(replace(self._steerer, search=None if corpus is None else CorpusSearch(corpus)))

    @property
    def domain_statistics(self) -> DomainStatistics | None:
        """What is known of the unlabelled images that the SAE is for; the methods beyond VS2 need it."""
        return self.sae.domain_statistics

    def set_domain_statistics(self, statistics: DomainStatistics | None) -> None:
        """Give the SAE of the deepest steered layer other [`DomainStatistics`], as [`measure_statistics`] makes them,
        or with `None` take them away. What was fitted for label sets is dropped. `save_pretrained` keeps them.

        Raises:
            `ValueError`: if they are of rows of another width or number of latents, or do not serve the settings in
                force.
        """
        if statistics is None and self._steerer.settings.rule.needs_statistics:
            raise ValueError(
                f"method={self._steerer.settings.method!r} is in force and needs them. Set another method first."
            )
        before = self.domain_statistics
        self.sae.set_domain_statistics(statistics)
        try:
            self._use(self._steerer.with_())  # thresholds may be others
        except ValueError:
            self.sae.set_domain_statistics(before)
            raise
        self._steerer.label_sets.clear()

    # Steering

    def steer_cls(self, rows: torch.Tensor, layer: int = -1, **retrieval: Unpack[RetrievalInputs]) -> VS2ImageFeatures:
        """Steer CLS rows `(batch, hidden_size)` of one layer (algorithm 1): encode, gate on FVU, move, keep the norm.

        `method="vs2++"` needs `class_embeds=`, and may need `retrieval_embeds=` and `exclude=`: see
        [`RetrievalInputs`].
        """
        return self.steerer.steer(rows, layer, **retrieval)

    # Label sets

    def fit_label_set(
        self,
        labels: Sequence[str],
        *,
        processor: Any = None,
        templates: str | Path | Sequence[str] | None = None,
        clean: bool = True,
    ) -> FittedLabels:
        """
        What the method in force makes of a label set, fitted on the unlabelled rows of the statistics and kept: the
        next call with these labels and templates, also of the pipeline, finds it, and `save_pretrained` saves it.

        It need not be called: any label set is fitted when it is first scored.

        Args:
            labels (`list[str]`): the labels.
            processor (*optional*): a `CLIPProcessor`, or a pair of tokenizer and image processor. By default they are
                read from where the checkpoint, or else its CLIP, was loaded from.
            templates (*optional*): prompts, anything [`resolve_templates`] takes; by default the pipeline's.
            clean (`bool`): read labels by [`clean_class_names`] before they go into prompts.

        Returns:
            [`FittedLabels`], with `rows_per_label`.

        Raises:
            `ValueError`: if the method fits nothing, or labels are missing, empty, given twice or the same to this
            CLIP.
        """
        labels = names_in(labels, "labels")
        clean_class_names(labels, clean, "labels")
        tokenizer, _ = processing_of(self, processor)
        templates = DEFAULT_TEMPLATES if templates is None else templates
        embeds = class_embeddings(self.clip, tokenizer, labels, templates, clean=clean)
        return self.steerer.fit_classes(embeds, tuple(labels))

    def fit_classes(self, class_embeds: torch.Tensor) -> FittedLabels:
        """[`fit_label_set`] of class embeddings `(num_classes, projection_dim)`; kept for the next call, but not
        saved."""
        return self.steerer.fit_classes(class_embeds)

    @property
    def fitted_label_sets(self) -> tuple[FittedLabels, ...]:
        """What [`fit_label_set`] fitted, or a checkpoint brought, of the weights and statistics that the model has
        now."""
        return self._steerer.label_sets.named_now(self._steerer)

    def image_mean(self) -> torch.Tensor:
        """Mean unit embedding of the statistics' images under the step in force, `(projection_dim,)`.

        Raises:
            `ValueError`: without statistics.
        """
        if self.domain_statistics is None:
            raise ValueError("There are no statistics to take a mean image from: see set_domain_statistics.")
        return self.steerer.label_sets.image_mean(self.steerer)

    def class_logits(self, images: VS2ImageFeatures, class_embeds: torch.Tensor) -> torch.Tensor:
        """
        Logits of images for classes under the method in force, float32 `(batch, num_classes)`.

        Cosines with the classes, times `logit_scale`, for methods that change image features alone; for
        `"distribution_norm"`, `"balanced_norm"` and `"prototypes"` see [`label_scores`], on the same scale. An image
        that the gate held back has plain CLIP's.

        Args:
            images ([`VS2ImageFeatures`]): of [`image_features`] or [`image_features_from_cls`] under the same
                settings.
            class_embeds (`torch.Tensor` of shape `(num_classes, projection_dim)`): of unit length, see
                [`class_embeddings`].

        Raises:
            `ValueError`: naming the first row whose features or scores are not finite: they would be no answer.
        """
        return self.steerer.class_logits(images, class_embeds)

    # Explanations

    def explain(
        self,
        images: Any,
        labels: Sequence[str] | torch.Tensor,
        *,
        processor: Any = None,
        templates: str | Path | Sequence[str] | None = None,
        names: Any = None,
        vocabulary: Sequence[str] | None = None,
        clean: bool = True,
        retrieval_embeds: torch.Tensor | None = None,
        exclude: torch.Tensor | None = None,
    ) -> VS2Explanation:
        """
        Which latents moved which label's score by how much, for each image, under the settings in force.

        For many images or calls use the pipeline with `explain=True`, which keeps the labels' embeddings.

        Args:
            images: one image or a list, as the pipeline takes them; or `pixel_values` `(batch, channels, height,
                width)`.
            labels (`list[str]`): the labels to choose from; or their embeddings `(num_labels, projection_dim)`.
            processor (*optional*): a `CLIPProcessor`, or a pair of tokenizer and image processor. By default they are
                read from where the checkpoint, or else its CLIP, was loaded from; not at all where images and labels
                are tensors.
            templates (*optional*): prompts, anything [`resolve_templates`] takes; by default the pipeline's.
            names (*optional*): of latents: a mapping, a sequence, [`LatentNames`], or the path of a `latents.json` of
                an atlas.
            vocabulary (`list[str]`, *optional*): words to name the latents by, see [`name_latents`].
            clean (`bool`): read labels by [`clean_class_names`] before they go into prompts.
            retrieval_embeds, exclude (`torch.Tensor`, *optional*): for `method="vs2++"`, see [`RetrievalInputs`].

        Raises:
            `ValueError`: if steering does not go through latents of the last layer alone, or something that is needed
                is missing.
        """
        retrieval = RetrievalInputs(retrieval_embeds=retrieval_embeds, exclude=exclude)
        processing = partial(processing_of, self, processor)
        return explain_images(self.steerer, images, labels, processing, templates, names, vocabulary, clean, retrieval)

    def explain_from_cls(
        self,
        rows: torch.Tensor,
        class_embeds: torch.Tensor,
        labels: Sequence[str] | None = None,
        *,
        names: Any = None,
        retrieval_embeds: torch.Tensor | None = None,
        exclude: torch.Tensor | None = None,
    ) -> VS2Explanation:
        """[`VS2CLIPForZeroShot.explain`] of cached CLS rows `(batch, hidden_size)` of the last layer and label
        embeddings `(num_labels, projection_dim)`."""
        retrieval = RetrievalInputs(class_embeds=class_embeds, retrieval_embeds=retrieval_embeds, exclude=exclude)
        return explain_rows(self.steerer, rows, class_embeds, labels, resolve_names(names), retrieval)

    def cls_rows(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Plain CLIP's CLS rows of the last layer, `(batch, hidden_size)`: what [`image_features_from_cls`] takes."""
        return family_of(self.clip).row(tower_of(self.clip)(pixel_values=pixel_values, **kwargs))
