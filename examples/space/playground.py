"""What the Space shows, without a word about how it looks: one steered CLIP, and what it says of an image."""

import hashlib
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image

import hf_vs2
from hf_vs2 import LatentEdits, VS2Explanation
from hf_vs2.data.batches import read_pixels
from hf_vs2.data.inputs import NamedImage, NamedImages
from hf_vs2.data.pixels import Normalizer
from hf_vs2.latent_names import LatentNames, name_latents
from hf_vs2.methods import METHODS, Method


MOST_LABELS = 200
LONGEST_LABEL = 200  # letters; a text tower reads 77 tokens
KEPT_IMAGES = 256
SHOWN_LATENTS = 8
IMAGES_A_LATENT = 5
THUMBNAIL = 72


class Playground:
    """
    A steered CLIP that answers many people at once. An image and a set of labels are encoded once, whatever is asked of them after.

    Args:
        checkpoint: a VS2 checkpoint, a folder or a Hub id.
        images (`datasets.Dataset`, *optional*): with a column `image`, to show what activates a latent.
        words (sequence of `str`, *optional*): two or more, to name latents with.
    """

    def __init__(
        self, checkpoint: str | os.PathLike, images: Dataset | None = None, words: Sequence[str] | None = None
    ):
        self.classifier = hf_vs2.zero_shot_classifier(checkpoint)
        self.model = self.classifier.model
        self.defaults = self.model.steering_settings
        self.images = images
        self._lock = threading.Lock()  # the settings belong to the model, and the model to everybody
        self._rows: dict[bytes, torch.Tensor] = {}
        self._embed = lru_cache(maxsize=64)(self._encode_labels)
        self._thumbnail = lru_cache(maxsize=4096)(self._make_thumbnail)
        self._top = None if images is None else self._strongest_images(images)
        self._names: LatentNames | None = None
        if words is not None:
            self._names = name_latents(self.model, self.classifier.tokenizer, words, top=1, progress=True)

    @property
    def methods(self) -> dict[str, Method]:
        """Those whose scores can be taken apart, and that this checkpoint can serve; the checkpoint's own first."""
        own = self.defaults.method
        shown = {
            name: method
            for name, method in METHODS.items()
            if (
                method.explains
                or (method.fit is not None and method.step is None)
                or (name == own and not method.acts)  # a checkpoint for which plain CLIP was chosen
            )
            and self._serves(method)
        }
        if own not in shown:
            raise ValueError(f"This page can't take the scores of the checkpoint's method, {own!r}, apart.")
        return {name: shown[name] for name in sorted(shown, key=lambda name: name != own)}

    def _serves(self, method: Method) -> bool:
        try:
            self.model.steerer.with_(method=method.name, gate=None, fvu_threshold=None)
        except ValueError:  # it lacks statistics, or scores labels by a sigmoid
            return False
        return not method.needs_corpus

    @property
    def has_gate(self) -> bool:
        """Whether there is a gate to switch on."""
        return self.defaults.gate is not None or self.defaults.fvu_threshold is not None

    @property
    def has_own_gammas(self) -> bool:
        """Whether the checkpoint has one gamma for each latent, which one slider can't replace."""
        return isinstance(self.defaults.gamma, tuple)

    def explain(
        self,
        image: bytes,
        labels: tuple[str, ...],
        gamma: float,
        lambda_: float,
        gate: bool,
        method: str | None = None,
        off: Sequence[int] = (),
    ) -> VS2Explanation:
        """Scores before and after, and the latents between them. The image comes as the bytes of its file; no method
        is the checkpoint's; latents that are off have the value 0, whatever the checkpoint does with them.

        Raises:
            `ValueError`: on an image that cannot be read, or a method that is not one of `methods`.
        """
        method = method or next(iter(self.methods))
        if method not in self.methods:
            raise ValueError(f"{method!r} is no method of this page. Use one of: {', '.join(self.methods)}.")
        row, classes = self._row(image), self._embed(labels)
        settings = {"lambda_": lambda_} if self.has_own_gammas else {"gamma": gamma, "lambda_": lambda_}
        settings["method"] = method
        if off:
            settings["edits"] = self._switched_off(off)
        if not gate:
            settings |= {"gate": None, "fvu_threshold": None}
        with self._lock, self.model.steering(**settings):
            return self.model.explain_from_cls(row, classes, labels)

    def has_latents(self, method: str | None) -> bool:
        """Whether latents can be switched off in it: in those alone whose scores are sums over latents."""
        return METHODS[method or next(iter(self.methods))].explains

    def name(self, latent: int, with_nearest: bool = True) -> str:
        """A latent's name; where no word is its name, the word that is nearest."""
        if self._names is None:
            return ""
        (word, score), name = self._names.of(latent)[0], self._names.name(latent)
        if name is None:
            return f"unnamed (nearest: {word} {score:.2f})" if with_nearest else "unnamed"
        return name

    def threshold(self, method: str) -> float | None:
        """The gate's, where the method's gate goes by FVU."""
        if not (self.has_gate and METHODS[method].reads_latents):
            return None
        return next(iter(self.model.steerer.with_(method=method).fvu_thresholds.values()))

    def strongest_images(self, latent: int) -> list[Image.Image]:
        """Thumbnails of the images on which a latent is largest; none where it is never active."""
        if self._top is None:
            return []
        values, places = self._top
        return [
            self._thumbnail(int(place))
            for value, place in zip(values[:, latent], places[:, latent], strict=True)
            if value > 0
        ]

    def _switched_off(self, off: Sequence[int]) -> LatentEdits:
        """The checkpoint's own edits, but for latents that are off."""
        own = self.defaults.edits or LatentEdits()
        kept = [{latent: value for latent, value in edits if latent not in off} for edits in (own.amplify, own.set)]
        return LatentEdits(kept[0], {*own.suppress, *off}, kept[1])

    @torch.no_grad()
    def _row(self, image: bytes) -> torch.Tensor:
        key = hashlib.sha256(image).digest()
        row = self._rows.get(key)
        if row is None:
            row = self._cls_rows([NamedImage(image)])
            with self._lock:
                while len(self._rows) >= KEPT_IMAGES:
                    self._rows.pop(next(iter(self._rows)))
                self._rows[key] = row
        return row

    def _cls_rows(self, images: Sequence[NamedImage]) -> torch.Tensor:
        """Rows of images that are read as the pipeline reads them."""
        processor, clip = self.classifier.image_processor, self.model.clip
        pixels = Normalizer(processor, clip.device)(read_pixels(images, processor))
        return self.model.cls_rows(pixels.to(clip.dtype))

    def _encode_labels(self, labels: tuple[str, ...]) -> torch.Tensor:
        return hf_vs2.class_embeddings(self.model.clip, self.classifier.tokenizer, labels, "single")

    @torch.no_grad()
    def _strongest_images(self, images: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        num_latents = self.model.sae.W_dec.shape[0]
        codes = torch.zeros(len(images), num_latents)
        named = NamedImages(images["image"])
        for start in range(0, len(named), 64):
            batch = [named[place] for place in range(start, min(start + 64, len(named)))]
            values, indices = self.model.sae.encode(self._cls_rows(batch))
            codes[start : start + len(batch)].scatter_(1, indices.cpu(), values.float().cpu())
        return codes.topk(min(IMAGES_A_LATENT, len(images)), dim=0)

    def _make_thumbnail(self, place: int) -> Image.Image:
        image = NamedImages(self.images["image"])[place].read()
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        return image


def read_labels(text: str) -> tuple[str, ...]:
    """Labels from a line or several, separated by commas; each once.

    Raises:
        `ValueError`: on none, one alone, more than there is room for, or one that no text tower would read.
    """
    labels = tuple(
        dict.fromkeys(word.strip() for line in (text or "").splitlines() for word in line.split(",") if word.strip())
    )
    if len(labels) < 2:
        raise ValueError("Give at least two labels, separated by commas: there is nothing to choose from otherwise.")
    if len(labels) > MOST_LABELS:
        raise ValueError(f"{len(labels)} labels are too many for this page; give up to {MOST_LABELS}.")
    longest = max(labels, key=len)
    if len(longest) > LONGEST_LABEL:
        raise ValueError(
            f"A label of {len(longest)} letters ({longest[:20]}...) is too long; give up to {LONGEST_LABEL} each."
        )
    return labels


def demo_checkpoint(folder: Path) -> Path:
    """The checkpoint that `hf-vs2 demo` makes, offline and in half a minute; the one in `folder` if it is there."""
    if not (folder / "results.json").is_file():  # the last thing that it writes
        from hf_vs2.demo.run import run_demo

        print(f"Making the demo's checkpoint in {folder} (once) ...", flush=True)
        run_demo(folder, progress=False)
    return folder / "model"
