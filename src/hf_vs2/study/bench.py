"""The workbench of a study: everything its methods share, made when first asked for and kept.

Activations and SAEs are files under the study's folder, so a second run finds them; class matrices, embeddings of the
corpus and neighbours are worked out again, which takes seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import CONFIG_NAME, logging

from ..clip.modeling import VS2CLIPForZeroShot
from ..config.sae import SAEConfig
from ..data.labels.prompts import check_prompts, class_embeddings
from ..data.pixels import Normalizer
from ..data.registry import DatasetInfo
from ..data.stores.activations import ActivationStore, extract_activations
from ..data.stores.fingerprint import dataset_fingerprint
from ..data.stores.rows import rows_of
from ..data.stores.store_format import request_key, request_of
from ..encoders.loading import load_clip
from ..encoders.processing import load_processing
from ..encoders.tail import at_temperature, check_scores, mean_embed, plain_embeds, probabilities, unit_embeds
from ..encoders.vision_tower import best_device
from ..evaluation.controls import control_model
from ..files.digests import tensor_digest
from ..files.weight_files import read_tensors, write_tensors
from ..functional.neighbors import nearest_neighbors, pseudo_labels
from ..sae.modeling import SAEModel
from ..sae.statistics import DomainStatistics
from ..steering.retrieval import embed_images, image_batches
from ..training.arguments import SAETrainingArguments
from ..training.calibration import activation_statistics, split_rows
from ..training.domain import measure_statistics
from ..training.label_losses import PrototypeAlignment
from ..training.output_folder import checkpoints
from ..training.trainer import SAETrainer
from .config import StudyConfig
from .materials import DeepFeatures, Encoder, Neighbors, SAESpec
from .results.cells import Cell
from .views import AugmentedView


logger = logging.get_logger(__name__)

BATCH, IMAGE_BATCH = 1024, 64
Split = Literal["train", "test"]


class Bench:
    """
    Args:
        config (`StudyConfig`): the study.
        progress (`bool`): show a progress bar for what takes long.
    """

    def __init__(self, config: StudyConfig, progress: bool = True):
        self.config, self.progress = config, progress
        self.folder = Path(config.output_dir)
        # Small things are kept for the whole study, large ones only while their neighbours in the plan need them.
        self.encoder = cache(self._encoder)
        self.images = cache(self._images)
        self.rows = cache(self._rows)
        self.content = cache(self._content)
        self.class_names = cache(self._class_names)
        self.class_matrix = cache(self._class_matrix)
        self.mean = cache(self._mean)
        self.image_mean = cache(self._image_mean)
        self.sae = lru_cache(maxsize=16)(self._sae)
        self.statistics = lru_cache(maxsize=4)(self._statistics)
        self.deep_features = lru_cache(maxsize=1)(self._deep_features)
        self.corpus_embeds = lru_cache(maxsize=1)(self._corpus_embeds)
        self.corpus_codes = lru_cache(maxsize=1)(self._corpus_codes)
        self.corpus_labels = lru_cache(maxsize=2)(self._corpus_labels)
        self.neighbors = lru_cache(maxsize=1)(self._neighbors)

    # Encoders and images

    def _encoder(self, name: str) -> Encoder:
        entry = self.config.encoder(name)
        clip = load_clip(entry.source, {"revision": entry.revision})
        tokenizer, image_processor = load_processing(entry.source, entry.revision)
        return Encoder(clip.eval().to(best_device()), tokenizer, image_processor)

    def _images(self, dataset: str, split: Split, limit: int | None = None) -> Any:
        """The images of `"train"` or `"test"`; with a limit, those of [`Bench.limited`]."""
        if limit is not None:
            images = self.images(dataset, split)
            return images if limit >= len(images) else images.select(self.limited(dataset, split, limit).tolist())
        return self.config.dataset(dataset).load(split)

    def _rows(
        self, encoder: str, dataset: str, split: Split, inner: bool = False, view: int | None = None
    ) -> ActivationStore:
        """CLS rows of the last layer; those of all others, of the images that `inner_layers` allows; or of an
        augmented view."""
        clip, _, processor = self.encoder(encoder)
        info = self.config.dataset(dataset)
        images = self.images(dataset, split, self.config.inner_layers.train_limit if inner else None)
        layers = range(clip.vision_model.config.num_hidden_layers - 1) if inner else (-1,)
        return extract_activations(
            clip,
            images,
            self.folder / "activations",
            layers=tuple(layers),
            image_column=info.image_column,
            label_column=info.label_column if info.label_column in images.column_names else None,
            image_processor=processor if view is None else AugmentedView(processor, view),
            progress=self.progress,
            dataset_id=info.source_id,
        )

    def identified(self, cell: Cell) -> Cell:
        """The cell with what its encoder and images are now, by content: a path or a branch keeps its name when they
        change."""
        named = dict.fromkeys((cell.dataset, *cell.params.get("trained_on", ())))
        content = {name: self.content(cell.encoder, name) for name in named}
        return replace(cell, origin={**cell.origin, "content": content})

    def _content(self, encoder: str, dataset: str) -> list[str]:
        """Of the test rows (which stands for the encoder too) and of the training images."""
        info, images = self.config.dataset(dataset), self.images(dataset, "train")
        label = info.label_column if info.label_column in images.column_names else None
        rows = self.rows(encoder, dataset, "test")
        return [request_key(request_of(rows.metadata)), dataset_fingerprint(images, info.image_column, label)]

    def labels(self, encoder: str, dataset: str, split: Split = "test") -> torch.Tensor:
        """The class of each row `(n,)`, as the test split counts them.

        Raises:
            ValueError: the split has none, or counts other classes.
        """
        rows = self.rows(encoder, dataset, split)
        labels, names, theirs = rows.labels, rows.class_names, self.rows(encoder, dataset, "test").class_names
        if names and theirs and names != theirs:
            raise ValueError(
                f"{dataset}: the {split} split has other classes ({names}) than the test split ({theirs})."
            )
        if labels is None or (labels < 0).any():
            raise ValueError(
                f"{dataset}: accuracy, PASS and the oracles need a label for each image, in column "
                f"{self.config.dataset(dataset).label_column!r}; the {split} split has images without."
            )
        return labels

    def limited(self, dataset: str, split: Split, limit: int | None) -> torch.Tensor:
        """Numbers of the images that a limit leaves: drawn at random, but always the same."""
        total = len(self.images(dataset, split))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        return order[: total if limit is None else limit].sort().values

    def batches(self, cell: Cell, view: int | None = None) -> Iterator[torch.Tensor]:
        """The rows to evaluate, on the encoder's device."""
        device = self.encoder(cell.encoder).clip.device
        for rows in self.rows(cell.encoder, cell.dataset, "test", view=view).iter_batches(BATCH):
            yield rows.to(device)

    def embed(self, encoder: str, rows: torch.Tensor) -> torch.Tensor:
        """Unit image embeddings of plain CLIP from CLS rows of the last layer."""
        return plain_embeds(self.encoder(encoder).clip, rows, f"row {{}} of a batch of {encoder}".format)

    # Prompts

    def _class_names(self, dataset: str) -> list[str]:
        info: DatasetInfo = self.config.dataset(dataset)
        return info.class_names(self.images(dataset, "test"))

    def classes(self, cell: Cell) -> torch.Tensor:
        """The class matrix `(num_classes, projection_dim)` of a cell's data set and prompts."""
        return self.class_matrix(cell.encoder, cell.dataset, cell.prompts)

    def _class_matrix(self, encoder: str, dataset: str, prompts: str) -> torch.Tensor:
        return class_embeddings(*self._prompts(encoder, dataset, prompts))

    def check_prompts(self, encoder: str, dataset: str, prompts: str) -> None:
        """Refuses classes without names, and names that this encoder can't tell apart."""
        check_prompts(*self._prompts(encoder, dataset, prompts))

    def _prompts(self, encoder: str, dataset: str, prompts: str) -> tuple[Any, Any, list[str], Any]:
        clip, tokenizer, _ = self.encoder(encoder)
        templates = self.config.dataset(dataset).templates if prompts == "published" else prompts
        return clip, tokenizer, self.class_names(dataset), templates

    # Statistics of the unlabelled training rows

    def share(self, dataset_rows: int, share: float, seed: int) -> torch.Tensor:
        """Numbers of the rows that a share stands for; at least two, which is the least that has a variance."""
        order = torch.randperm(dataset_rows, generator=torch.Generator().manual_seed(seed))
        return order[: max(2, round(share * dataset_rows))].sort().values

    def _mean(self, encoder: str, dataset: str, share: float = 1.0, seed: int = 0) -> torch.Tensor:
        """Mean CLS row."""
        rows = self.rows(encoder, dataset, "train")
        mean, _ = activation_statistics(rows_of(rows), self.share(len(rows), share, seed))
        return mean.to(self.encoder(encoder).clip.device)

    def _image_mean(self, encoder: str, dataset: str) -> torch.Tensor:
        """Mean unit embedding of plain CLIP, summed in float64."""
        rows = self.rows(encoder, dataset, "train")
        clip = self.encoder(encoder).clip
        return mean_embed(clip, rows.iter_batches(BATCH)).to(clip.device)

    # SAEs

    def spec(self, cell: Cell) -> SAESpec:
        """The SAE that a cell is about."""
        params, settings = cell.params, self.config.sae
        return SAESpec(
            trained_on=tuple(params.get("trained_on", (cell.dataset,))),
            seed=cell.seed or 0,
            top_k=params.get("top_k", settings.top_k),
            expansion_factor=params.get("expansion_factor", settings.expansion_factor),
            share=params.get("share", 1.0),
            pass_weight=params.get("pass_weight", 0.0),
        )

    def model(self, cell: Cell) -> VS2CLIPForZeroShot:
        """The encoder with the cell's SAE on its last layer, gamma and lambda set, no gate."""
        sae = self.sae(cell.encoder, self.spec(cell))
        model = VS2CLIPForZeroShot(self.encoder(cell.encoder).clip, sae).eval()
        model.set_steering(
            gamma=cell.params.get("gamma", model.steering_settings.gamma),
            lambda_=cell.params.get("lambda", model.steering_settings.lambda_),
        )
        return model

    def _statistics(self, encoder: str, dataset: str, spec: SAESpec, sketch_rows: int) -> DomainStatistics:
        """Of the data set's training rows, less those held out from the SAE's training: as the trainer measures
        them."""
        rows, training = self.rows(encoder, dataset, "train"), self.config.sae.training
        share = training.get("calibration_share", SAETrainingArguments.calibration_share)
        train, held_out = split_rows(len(rows), share, spec.seed)
        sae = self.sae(encoder, spec)
        return measure_statistics(sae, rows, train, held_out, sketch_rows=sketch_rows, seed=spec.seed)

    def adapted_model(self, cell: Cell, dictionary: str | None = None) -> VS2CLIPForZeroShot:
        """[`Bench.model`] with statistics of the cell's training rows; with a dictionary, see [`control_model`]."""
        model = self.model(cell)
        sketch_rows = cell.params["sketch_rows"]
        model.set_domain_statistics(self.statistics(cell.encoder, cell.dataset, self.spec(cell), sketch_rows))
        return model if dictionary is None else control_model(model, dictionary, cell.seed or 0)

    def _deep_features(self, encoder: str, spec: SAESpec, num_layers: int | None, method: str) -> DeepFeatures:
        """The whole model on the images that `inner_layers.test_limit` leaves, with an SAE on each of its last layers
        (all of them for `None`): what an inner layer does to those above can't be replayed on cached rows."""
        clip, _, processor = self.encoder(encoder)
        (dataset,) = spec.trained_on
        last = clip.vision_model.config.num_hidden_layers - 1
        lowest = 0 if num_layers is None else last - num_layers + 1
        if lowest < 0:
            raise ValueError(f"{encoder} has {last + 1} layers: {num_layers} can't be steered.")
        saes = {
            layer: self.sae(encoder, replace(spec, layer=-1 if layer == last else layer))
            for layer in range(lowest, last + 1)
        }
        settings = self.config.steering
        model = VS2CLIPForZeroShot(clip, saes).eval()
        model.set_steering(method=method, gamma=settings.gamma, lambda_=settings.lambda_)
        images = self.images(dataset, "test", self.config.inner_layers.test_limit)
        normalizer, column = Normalizer(processor, clip.device), self.config.dataset(dataset).image_column
        features, fvu = [], []
        with contextlib.closing(image_batches(images, column, processor, IMAGE_BATCH, clip.device)) as batches:
            for pixels, names in batches:
                out = model.image_features(normalizer(pixels).to(clip.dtype))
                features.append(unit_embeds(out.features, names.__getitem__))
                fvu.append(out.fvu.reshape(len(names), -1)[:, -1])
        return DeepFeatures(torch.cat(features), torch.cat(fvu))

    def _sae(self, encoder: str, spec: SAESpec) -> SAEModel:
        folder = self.train(encoder, spec)
        return SAEModel.from_pretrained(folder).to(self.encoder(encoder).clip.device).eval()

    @torch.enable_grad()
    def train(self, encoder: str, spec: SAESpec) -> Path:
        """The checkpoint of an SAE, trained now unless it is there; an interrupted training goes on."""
        stores = [self.rows(encoder, name, "train", inner=spec.layer >= 0) for name in spec.trained_on]
        folder = self.folder / "saes" / self._sae_name(encoder, spec, stores)
        # As long as it is not finished there are training checkpoints, or no SAE.
        if (folder / CONFIG_NAME).is_file() and not checkpoints(folder):
            return folder
        settings = self.config.sae
        args = SAETrainingArguments(
            output_dir=str(folder),
            seed=spec.seed,
            save_total_limit=1,
            disable_tqdm=True,
            **settings.training,
        )
        config = SAEConfig(
            hidden_size=stores[0].hidden_size,
            top_k=spec.top_k,
            expansion_factor=spec.expansion_factor,
            activation=settings.activation,
        )
        total = sum(map(len, stores))
        indices = None if spec.share == 1 else self.share(total, spec.share, spec.seed)
        loss = PrototypeAlignment(spec.pass_weight) if spec.pass_weight else None
        layer = None if spec.layer == -1 else spec.layer
        SAETrainer(config, args, stores, layer, indices=indices, label_loss=loss).train()
        for checkpoint in checkpoints(folder):
            shutil.rmtree(checkpoint)
        return folder

    def _sae_name(self, encoder: str, spec: SAESpec, stores: list[ActivationStore]) -> str:
        origin: dict[str, Any] = asdict(spec) | {
            "rows": [request_key(request_of(store.metadata)) for store in stores],
            "activation": self.config.sae.activation,
            "training": dict(self.config.sae.training),
        }
        digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:12]
        words = [encoder, "+".join(spec.trained_on), f"k{spec.top_k}", f"x{spec.expansion_factor}"]
        words += [f"layer{spec.layer}"] if spec.layer >= 0 else []
        words += [f"share{spec.share:g}"] if spec.share != 1 else []
        words += [f"pass{spec.pass_weight:g}"] if spec.pass_weight else []
        return "-".join([*words, f"seed{spec.seed}", digest])

    # The corpus of VS2++: the training rows

    def _corpus_embeds(self, encoder: str, dataset: str) -> torch.Tensor:
        rows = self.rows(encoder, dataset, "train")
        return torch.cat([self.embed(encoder, batch) for batch in rows.iter_batches(BATCH)])

    def _corpus_codes(self, encoder: str, dataset: str, spec: SAESpec) -> tuple[torch.Tensor, torch.Tensor]:
        """The active latents of each row of the corpus: values and indices, each `(rows, top_k)`."""
        sae = self.sae(encoder, spec)
        rows = self.rows(encoder, dataset, "train")
        codes = [sae.encode(batch.to(sae.device)) for batch in rows.iter_batches(BATCH)]
        values, indices = zip(*codes, strict=True)
        return torch.cat(values), torch.cat(indices)

    def _corpus_labels(self, encoder: str, dataset: str, prompts: str, true: bool) -> torch.Tensor:
        """The class of each row of the corpus: CLIP's own guess with these prompts, or the true one."""
        if true:
            return self.labels(encoder, dataset, "train").to(self.encoder(encoder).clip.device)
        return pseudo_labels(self.corpus_embeds(encoder, dataset), self.class_matrix(encoder, dataset, prompts))

    def corpus_confidence(self, encoder: str, dataset: str, prompts: str) -> torch.Tensor:
        """The probability that plain CLIP gives to the true class of each row of the corpus `(rows,)`."""
        clip, classes = self.encoder(encoder).clip, self.class_matrix(encoder, dataset, prompts)
        labels = self.corpus_labels(encoder, dataset, prompts, True)
        blocks = zip(self.corpus_embeds(encoder, dataset).split(BATCH), labels.split(BATCH), strict=True)
        found = [
            probabilities(check_scores(clip, at_temperature(clip, block @ classes.T)), clip).gather(
                1, true.unsqueeze(1)
            )
            for block, true in blocks
        ]
        return torch.cat(found).squeeze(1)

    def _neighbors(self, encoder: str, dataset: str) -> Neighbors:
        """As many neighbours as any cell of the study asks for."""
        config = self.config
        if config.retrieval.encoder is None:
            rows = self.rows(encoder, dataset, "test")
            queries = torch.cat([self.embed(encoder, batch) for batch in rows.iter_batches(BATCH)])
            corpus = self.corpus_embeds(encoder, dataset)
        else:
            queries, corpus = (self._retrieval_embeds(dataset, split) for split in ("test", "train"))
        wanted = max(config.retrieval.num_neighbors, *config.ablations.num_neighbors, 1)
        return Neighbors(*nearest_neighbors(queries, corpus, min(wanted, len(corpus))))

    def _retrieval_embeds(self, dataset: str, split: Split) -> torch.Tensor:
        """Unit embeddings of the images of a split by the encoder of `retrieval`, kept on disk: it reads every
        image."""
        retrieval, info = self.config.retrieval, self.config.dataset(dataset)
        images = self.images(dataset, split)
        origin = [retrieval.source, dataset_fingerprint(images, info.image_column, None)]
        digest = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:12]
        path = self.folder / "retrieval" / f"{dataset}-{split}-{digest}.safetensors"
        if path.is_file():
            try:
                tensors, header = read_tensors(path)
                if header in ("null", json.dumps(tensor_digest(tensors["embeds"]))):  # earlier versions wrote none
                    return tensors["embeds"]
            except (ValueError, KeyError):
                pass
            logger.warning(f"{path} is damaged: the images are read again.")
        assert retrieval.encoder is not None
        embeds = embed_images(
            retrieval.encoder,
            images,
            image_column=info.image_column,
            revision=retrieval.revision,
            progress=self.progress,
        ).cpu()
        write_tensors(path, {"embeds": embeds}, tensor_digest(embeds))
        return embeds
