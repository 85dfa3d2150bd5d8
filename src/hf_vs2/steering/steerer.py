"""The core: what happens to the rows of a batch, from the CLS row to the score, free of `PreTrainedModel`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, Unpack, cast

import torch
from transformers import CLIPModel

from ..config.steering import Steering, changed
from ..encoders.base_model import resolve_layer
from ..encoders.families import embedding_width, family_of, tower_of
from ..encoders.layers import run_layers
from ..encoders.tail import logits_of_images, plain_outputs, project, rows_for, softmax_temperature
from ..encoders.wrapped import weights_of
from ..files.weight_state import Kept
from ..functional.equations import edited_change, gate
from ..functional.label_free import LabelFit, row_distance
from ..methods import Batch, LatentStep, NeighborCodes
from ..sae.modeling import SAEModel
from ..sae.statistics import DomainStatistics
from .corpus_search import CorpusSearch, RetrievalInputs
from .label_sets import FittedLabels, LabelSets
from .outputs import VS2ImageFeatures, per_image


T = TypeVar("T")


class Moved(NamedTuple):
    """What was done to CLS rows, and how."""

    record: VS2ImageFeatures
    """With `rows`, without features."""
    batch: Batch
    step: LatentStep | None
    """`None` where the method leaves rows alone."""


@dataclass(frozen=True, eq=False)
class Steerer:
    """
    A CLIP, its SAEs and settings. Immutable, so that threads may share one: [`Steerer.with_`] gives another for other
    settings.

    Args:
        clip (`CLIPModel`): used as it is.
        saes (`dict[int, SAEModel]`): by layer, ascending. The statistics of unlabelled rows are those of the deepest.
        settings ([`Steering`]): see there.
        label_sets ([`LabelSets`]): what was fitted for label sets, shared by all steerers of a model.
        search ([`CorpusSearch`], *optional*): the corpus of VS2++, likewise.
        call ([`Kept`], *optional*): see [`Steerer.for_one_call`].
    """

    clip: CLIPModel
    saes: Mapping[int, SAEModel]
    settings: Steering
    label_sets: LabelSets
    search: CorpusSearch | None = None
    call: Kept[Any] | None = None

    def with_(self, **settings: Any) -> Steerer:
        """The same with other settings; what is not named stays. Giving `gate` drops an earlier `fvu_threshold`, and
        the other way round.

        Raises:
            `TypeError`: on an unknown name. `ValueError`: on a value that can't be used with these SAEs.
        """
        other = replace(self, settings=changed(self.settings, settings), call=None)
        other.check()
        return other if self.call is None else other.for_one_call()

    def for_one_call(self) -> Steerer:
        """The same for the many batches of one call: what is kept of label sets and the corpus is asked for once, not
        once a batch. It trusts that the weights stay as they are meanwhile."""
        return replace(self, call=Kept(8))  # of so many label sets

    def _in_call(self, key: Hashable, make: Callable[[], T]) -> T:
        return make() if self.call is None else self.call.get(None, key, make)

    # What there is

    @property
    def num_layers(self) -> int:
        """Layers of the vision tower."""
        return tower_of(self.clip).config.num_hidden_layers

    @property
    def sae(self) -> SAEModel:
        """The SAE of the deepest steered layer."""
        return list(self.saes.values())[-1]

    @property
    def is_steering(self) -> bool:
        """Whether anything can differ from plain CLIP."""
        return self.settings.enabled and self.settings.rule.acts and len(self.saes) > 0

    @property
    def statistics(self) -> DomainStatistics:
        """Those of unlabelled rows; a `ValueError` where there are none."""
        if self.sae.domain_statistics is None:
            raise ValueError(
                f"method={self.settings.method!r} needs statistics of unlabelled images, and this checkpoint holds "
                "none. Measure them: hf-vs2 calibrate --checkpoint O --dataset D, or "
                "model.set_domain_statistics(hf_vs2.measure_statistics(model.sae, rows))."
            )
        return self.sae.domain_statistics

    @property
    def unlabelled_rows(self) -> torch.Tensor:
        """Those that the statistics keep, `(n, hidden_size)`; a `ValueError` where there are none."""
        if self.statistics.rows is None:
            raise ValueError(self.lacking_rows)
        return self.statistics.rows

    @property
    def lacks_rows(self) -> bool:
        """Whether the method is fitted to rows, and the statistics keep none."""
        known = self.sae.domain_statistics
        return self.settings.rule.needs_rows and known is not None and known.rows is None

    @property
    def lacking_rows(self) -> str:
        """What to say then."""
        return (
            f"method={self.settings.method!r} is fitted to rows of unlabelled images, and the statistics of this "
            "model keep none (--sketch_rows 0, or without_rows()). Use method='distribution_norm', which needs none, "
            "or calibrate again with rows: hf-vs2 calibrate."
        )

    @cached_property
    def fvu_thresholds(self) -> dict[int, float | None]:
        """The gate's threshold tau at each steered layer; `None` where nothing is gated by FVU."""
        settings = self.settings
        if not settings.measures_fvu or settings.gate is None:
            return dict.fromkeys(self.saes, settings.fvu_threshold)
        return {layer: sae.fvu_threshold(settings.gate) for layer, sae in self.saes.items()}

    @cached_property
    def distance_threshold(self) -> float | None:
        """That of methods which do not read the SAE."""
        settings = self.settings
        if settings.measures_fvu or settings.gate is None:
            return None
        return self.statistics.distance_threshold(settings.gate)

    def check(self) -> None:
        """Refuse, by a `ValueError`, settings that these SAEs, statistics and thresholds can't serve."""
        settings, rule = self.settings, self.settings.rule
        layers = list(self.saes)
        if rule.last_layer_only and layers != [self.num_layers - 1]:
            raise ValueError(
                f"method={settings.method!r} steers the last layer alone ({self.num_layers - 1}); this model holds "
                f"SAEs for layers {layers}."
            )
        if rule.needs_softmax:
            softmax_temperature(self.clip)
        if rule.needs_statistics:
            if settings.enabled and rule.needs_rows:
                self.unlabelled_rows  # noqa: B018
            mean, width = self.statistics.image_mean, embedding_width(self.clip)
            if mean is not None and tuple(mean.shape) != (width,):
                raise ValueError(
                    f"The mean image of the statistics is {tuple(mean.shape)}, and embeddings of this CLIP are "
                    f"({width},): they were measured with another one. Calibrate the checkpoint again."
                )
        edited = [] if settings.edits is None else settings.edits.latents
        if edited and len(layers) > 1:
            raise ValueError(
                f"edits name latents of one SAE; this model holds SAEs for layers {layers}. Set edits=None, or give a "
                "gamma for each latent."
            )
        for layer, sae in self.saes.items():
            num_latents = len(sae.W_dec)
            if isinstance(settings.gamma, tuple) and len(settings.gamma) != num_latents:
                raise ValueError(
                    f"gamma holds {len(settings.gamma)} factors, but the SAE of layer {layer} has {num_latents} "
                    "latents. Give one number, or one factor a latent."
                )
            beyond = [latent for latent in edited if latent >= num_latents]
            if beyond:
                raise ValueError(f"edits names the latent {beyond[0]}; the SAE has {num_latents}, counted from 0.")
        self.fvu_thresholds, self.distance_threshold  # noqa: B018  which a missing calibration refuses

    # CLS rows

    def steer(self, rows: torch.Tensor, layer: int = -1, **retrieval: Unpack[RetrievalInputs]) -> VS2ImageFeatures:
        """Steer CLS rows `(batch, hidden_size)` of one layer (algorithm 1): encode, gate, move, keep the norm."""
        return self.move(rows, layer, **retrieval).record

    def move(self, rows: torch.Tensor, layer: int = -1, **retrieval: Unpack[RetrievalInputs]) -> Moved:
        """[`Steerer.steer`], and how each row moved. Half-precision rows are steered in float32; the result goes back
        to where and what it came from."""
        index = resolve_layer(layer, self.num_layers)
        sae = self.saes.get(index)
        if sae is None:
            raise ValueError(f"No SAE for layer {index}: this model holds SAEs for layers {list(self.saes)}.")
        settings, rule = self.settings, self.settings.rule
        decoder, mean = weights_of(sae, "W_dec", "mean")
        x = rows.to(device=decoder.device, dtype=torch.promote_types(rows.dtype, torch.float32))
        batch = Batch(
            x=x,
            code=sae(x) if settings.measures_fvu else None,
            decoder=decoder,
            mean=mean,
            gamma=self._gamma_on(x.device),
            lambda_=settings.lambda_,
            statistics=lambda: self.statistics.on(x.device),
            neighbors=lambda: self._neighbors(sae, rows, retrieval),
        )
        moved, step = rows, None
        if rule.step is not None or settings.edits is not None:
            step = self._step(batch)
            moved = step.move(x, decoder).to(device=rows.device, dtype=rows.dtype)
        # A row that its dtype can't hold once moved, or whose squares overflow in the LayerNorm that follows, stays as
        # it was.
        steered = moved.to(x.dtype).square().sum(-1).isfinite().to(x.device)
        fvu = distance = None
        if batch.code is None:
            distance = row_distance(x, batch.statistics().of_rows)
            threshold = self.distance_threshold
        else:
            fvu, threshold = batch.code.fvu, self.fvu_thresholds[index]
        if threshold is not None:
            steered = steered & gate(cast(torch.Tensor, distance if fvu is None else fvu), threshold)
        if moved is not rows:
            moved = torch.where(steered.to(rows.device).unsqueeze(-1), moved, rows)
        record = VS2ImageFeatures(
            fvu=fvu,
            steered=steered,
            latent_values=None if batch.code is None else batch.values,
            latent_indices=None if batch.code is None else batch.indices,
            distance=distance,
            views=tuple(view.of(batch).float() for view in rule.views) or None,
            rows=moved,
        )
        return Moved(record, batch, step)

    def _step(self, batch: Batch) -> LatentStep:
        """The method's step, with the edits in the place of what it does to edited latents."""
        rule, edits = self.settings.rule, self.settings.edits
        step = batch.moved() if rule.step is None else rule.step(batch)
        if edits is None:
            return step
        device = batch.x.device
        table = self._once("edits", device, lambda: edits.table(device))
        change, latents = edited_change(batch.values, batch.indices, step.change, step.latents, table)
        return step._replace(change=change, latents=latents)

    def _gamma_on(self, device: torch.device) -> float | torch.Tensor:
        """gamma as the equations take it."""
        gamma = self.settings.gamma
        if not isinstance(gamma, tuple):
            return gamma
        return self._once("gamma", device, lambda: torch.tensor(gamma, device=device))

    def _once(self, what: str, device: torch.device, make: Callable[[], T]) -> T:
        """Settings as tensors are put on a device once. Not inside inference mode: they may serve a training step
        later."""
        if (what, device) not in self._on_devices:
            with torch.inference_mode(False):
                self._on_devices[what, device] = make()
        return self._on_devices[what, device]

    @cached_property
    def _on_devices(self) -> dict[tuple[str, torch.device], Any]:
        return {}

    def _neighbors(self, sae: SAEModel, rows: torch.Tensor, retrieval: RetrievalInputs) -> NeighborCodes:
        if self.search is None:
            raise ValueError(
                f"method={self.settings.method!r} needs a corpus to find neighbours in: "
                "model.set_corpus(RetrievalCorpus...)."
            )
        settings, search, classes = self.settings, self.search, retrieval.get("class_embeds")
        prepared = self._in_call(("corpus", classes), lambda: search.prepared(self.clip, sae, classes))
        return search.neighbors(prepared, self.clip, rows, settings.num_neighbors, settings.positives, **retrieval)

    # Features

    def features_from_cls(self, rows: torch.Tensor, **retrieval: Unpack[RetrievalInputs]) -> VS2ImageFeatures:
        """See [`VS2CLIPForZeroShot.image_features_from_cls`]."""
        last = self.num_layers - 1
        inner = [layer for layer in self.saes if layer != last]
        if inner and self.is_steering:
            raise ValueError(
                f"Layers {inner} are steered too; only the last layer's steering can be replayed on cached rows."
            )
        width = tower_of(self.clip).config.hidden_size
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(
                f"CLS rows of this CLIP are (batch, {width}); these are {tuple(rows.shape)}. "
                "Extract them again with the CLIP that this model wraps."
            )
        rows = rows_for(self.clip, rows)
        record = self.steer(rows, last, **retrieval) if self.is_steering else _untouched(rows)
        # Anew: the fields of a `ModelOutput` come in the order in which they are set, and `features` is the first.
        return replace(record, features=project(self.clip, cast(torch.Tensor, record.rows)))

    def features(
        self,
        pixel_values: torch.Tensor,
        with_plain: bool = False,
        retrieval: RetrievalInputs | None = None,
        **kwargs: Any,
    ) -> VS2ImageFeatures:
        """Of images `(batch, channels, height, width)`; see [`VS2CLIPForZeroShot.image_features`]."""
        if not self.is_steering:
            plain = plain_outputs(self.clip, pixel_values=pixel_values, **kwargs).pooler_output
            record = _untouched(plain)
            return VS2ImageFeatures(plain, steered=record.steered, plain_features=plain if with_plain else None)
        family = family_of(self.clip)
        outputs, done, rows = self.vision(pixel_values, retrieval or {}, **kwargs)
        features, plain = family.projection(self.clip)(outputs.pooler_output), None
        if with_plain and list(done) == [self.num_layers - 1]:
            plain = project(self.clip, rows)
        elif with_plain:
            plain = plain_outputs(self.clip, pixel_values=pixel_values, **kwargs).pooler_output
        views = next(iter(done.values())).views
        return VS2ImageFeatures(features, plain_features=plain, views=views, **per_image(done))

    def vision(
        self, pixel_values: torch.Tensor | None, retrieval: RetrievalInputs, **kwargs: Any
    ) -> tuple[Any, dict[int, VS2ImageFeatures], torch.Tensor]:
        """The vision tower's output with `pooler_output` steered (not yet projected), and what was done at each
        layer, and the rows of the last layer as they were."""
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")  # as CLIPModel says it
        vision, last, family = tower_of(self.clip), self.num_layers - 1, family_of(self.clip)
        done: dict[int, VS2ImageFeatures] = {}
        if list(self.saes) == [last]:
            outputs = vision(pixel_values=pixel_values, **kwargs)
        else:

            def between(index: int, rows: torch.Tensor) -> torch.Tensor | None:
                if index not in self.saes or index == last:
                    return None
                done[index] = self.steer(rows, index)
                return done[index].rows

            outputs = run_layers(vision, pixel_values, between, **kwargs)
        rows = steered = family.row(outputs)
        if last in self.saes:
            done[last] = self.steer(rows, last, **retrieval)
            steered = cast(torch.Tensor, done[last].rows)
        outputs.pooler_output = family.norm(self.clip)(steered)
        return outputs, done, rows

    # Scores

    def fit_classes(self, class_embeds: torch.Tensor, labels: tuple[str, ...] | None = None) -> FittedLabels:
        """What the method fits for class embeddings `(num_classes, projection_dim)`; with `labels` it is kept by
        name."""
        return self.label_sets.fitted(self, class_embeds, labels)

    def class_logits(
        self, images: VS2ImageFeatures, class_embeds: torch.Tensor, name: Callable[[int], str] = "row {}".format
    ) -> torch.Tensor:
        """Float32 `(batch, num_classes)`; see [`VS2CLIPForZeroShot.class_logits`]. `name`: of a row in a message."""
        score = lambda embeds: self.scores(images, embeds.to(class_embeds.device), class_embeds)  # noqa: E731
        return logits_of_images(self.clip, cast(torch.Tensor, images.features), score, name)

    def scores(
        self, images: VS2ImageFeatures, embeds: torch.Tensor, class_embeds: torch.Tensor, fit: LabelFit | None = None
    ) -> torch.Tensor:
        """The same on the scale of cosines, of images whose unit embeddings are `embeds` `(batch, projection_dim)`.
        `fit`: that of the classes, where it is at hand."""
        scores = embeds @ class_embeds.T
        if self.is_steering and self.settings.rule.fit is not None:
            make = lambda: self.fit_classes(class_embeds).fit.on(class_embeds.device)  # noqa: E731
            fit = fit or self._in_call(("fit", class_embeds), make)
            views = [view.to(class_embeds.device) for view in images.views or ()]
            steered = images.steered.to(class_embeds.device).unsqueeze(-1)
            scores = torch.where(steered, self.settings.rule.score(embeds, class_embeds, fit, views), scores)
        return scores


def _untouched(rows: torch.Tensor) -> VS2ImageFeatures:
    return VS2ImageFeatures(steered=torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device), rows=rows)
