"""Sets of images that `scripts/true_clip.py` scores rules on, and how it draws from them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from draws import halves, picked, shares_with
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel

from hf_vs2 import ActivationStore, class_embeddings
from hf_vs2.encoders.tail import clip_embeds
from hf_vs2.study import StudyConfig
from hf_vs2.study.bench import Bench


BATCH = 1024
SHARES = (0.5, 0.8, 0.95)
MOST_COMMON = 10
"""So many labels, those with the most images, are each made the common one."""
ROWS_PER_LABEL = (1, 3, 10, 30)
LEAST_ROWS = 30
MOST_EXTRA = 5000
# Cosine from which two rows are of one image.
SAME = 0.9999


@dataclass(frozen=True)
class ImageSet:
    """Unit embeddings `(n, d)` with their labels `(n,)`, class embeddings `(C, d)`, and `(m, d)` more that are only
    fitted to."""

    name: str
    encoder: str
    embeds: torch.Tensor
    labels: torch.Tensor
    classes: torch.Tensor
    temperature: float
    extra: torch.Tensor
    clip: CLIPModel | None = None
    cls: torch.Tensor | None = None
    """CLS rows of the images and then of `extra`, `(n + m, hidden_size)`, where they are known."""

    @property
    def everything(self) -> torch.Tensor:
        """Numbers of the images and of `extra`."""
        return torch.arange(len(self.embeds) + len(self.extra))

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.embeds, self.extra])[numbers]

    def only(self, kept: torch.Tensor) -> ImageSet:
        """Of the images those with these numbers; `extra` stays."""
        cls = None if self.cls is None else torch.cat([self.cls[kept], self.cls[len(self.embeds) :]])
        return replace(self, embeds=self.embeds[kept], labels=self.labels[kept], cls=cls)

    def half(self, number: int) -> ImageSet:
        """One of two halves of the images, always the same."""
        return self.only(halves(len(self.embeds), 12345)[number].sort().values)


class Scenario(NamedTuple):
    """Images to fit to, by number in the set `source`, images to score, by number in the set `own`, and its labels."""

    kind: str
    source: ImageSet
    fit: torch.Tensor
    own: ImageSet
    scored: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        return self.source.rows(self.fit)

    @property
    def images(self) -> torch.Tensor:
        return self.own.embeds[self.scored]

    @property
    def labels(self) -> torch.Tensor:
        return self.own.labels[self.scored]


# Sets


def embedding_sets(paths: Sequence[Path], temperature: float) -> list[ImageSet]:
    files = [file for path in paths for file in (sorted(path.glob("*.safetensors")) if path.is_dir() else [path])]
    sets = []
    for file in files:
        held = load_file(file)
        with safe_open(file, "pt") as opened:
            encoder = (opened.metadata() or {}).get("encoder", file.parent.name)
        unit = {name: normalize(held[name].float(), dim=-1) for name in ("image_embeds", "class_embeds")}
        extra = held.get("unlabelled_extra")
        extra = unit["image_embeds"][:0] if extra is None else normalize(extra.float(), dim=-1)
        sets.append(
            ImageSet(file.stem, encoder, unit["image_embeds"], held["label"], unit["class_embeds"], temperature, extra)
        )
    return sets


@torch.no_grad()
def embedded(clip: CLIPModel, rows: torch.Tensor) -> torch.Tensor:
    parts = [clip_embeds(clip, part.to(clip.device)).float().cpu() for part in rows.split(BATCH)]
    return normalize(torch.cat(parts), dim=-1)


def read_rows(path: str) -> tuple[torch.Tensor, torch.Tensor | None, list[str] | None]:
    """CLS rows, their labels and the class names, of an activation store or a safetensors file."""
    if not path.endswith(".safetensors"):
        store = ActivationStore.open(path)
        return store.tensor(-1), store.labels, store.class_names
    held = load_file(path)
    with safe_open(path, "pt") as opened:
        names = (opened.metadata() or {}).get("names")
    return held["cls"], held.get("label"), None if names is None else json.loads(names)


def row_sets(pairs: Sequence[str], name: str, without: Sequence[str]) -> list[ImageSet]:
    clip, tokenizer = CLIPModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
    seen = [embedded(clip, read_rows(path)[0]) for path in without]
    sets = []
    for pair in pairs:
        test, *more = pair.split("+")
        rows, labels, names = read_rows(test)
        cls = torch.cat([rows, *(read_rows(path)[0] for path in more)])
        if labels is None or names is None:
            raise SystemExit(f"{test} has no labels or no class names: rules can't be scored on it.")
        embeds = embedded(clip, cls)
        classes = normalize(class_embeddings(clip, tokenizer, names, "single").float(), dim=-1)
        scale, count = float(clip.logit_scale.detach().exp()), len(rows)
        found = ImageSet(
            Path(test).stem,
            Path(name).name if Path(name).exists() else name,
            embeds[:count],
            labels,
            classes,
            scale,
            embeds[count:],
            clip,
            cls,
        )
        sets.append(found.only(_unseen(found.embeds, seen).nonzero().squeeze(-1)))
    return sets


def _unseen(embeds: torch.Tensor, seen: Sequence[torch.Tensor]) -> torch.Tensor:
    new = torch.ones(len(embeds), dtype=torch.bool)
    for part in seen:
        for start in range(0, len(embeds), BATCH):
            block = embeds[start : start + BATCH]
            new[start : start + BATCH] &= (block @ part.T).amax(-1) < SAME
    return new


def study_sets(path: Path, output_dir: str | None) -> list[ImageSet]:
    """Test images are scored, and the training images are the unlabelled ones, as in the study."""
    config = StudyConfig.from_yaml(path, output_dir)
    bench, sets = Bench(config), []
    for entry in config.encoders:
        clip = bench.encoder(entry.name).clip
        for info in config.datasets:
            test, train = (bench.rows(entry.name, info.name, split).tensor(-1) for split in ("test", "train"))
            chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:MOST_EXTRA]
            cls = torch.cat([test, train[chosen]])
            embeds = embedded(clip, cls)
            classes = normalize(bench.class_matrix(entry.name, info.name, "single").float(), dim=-1).cpu()
            labels, scale = bench.labels(entry.name, info.name), float(clip.logit_scale.detach().exp())
            images, extra = embeds[: len(test)], embeds[len(test) :]
            sets.append(ImageSet(info.name, entry.name, images, labels, classes, scale, extra, clip, cls))
    return sets


# Draws


def scenarios_of(own: ImageSet, same_encoder: Sequence[ImageSet], seeds: int) -> Iterator[Scenario]:
    """
    - `even`: fitted to a half and `extra`, scored on the other half; both ways, for each seed.
    - `the same rows`: scored on the very half that it was fitted to.
    - `N rows a label`: of the rows of `even`, so many in all.
    - `P% of one label`: of the rows and of the images scored; `, scored on even`: of the rows alone. As many rows as
      there are, no image twice.
    - `few labels shown`: half or a fifth of the labels have images.
    - `long tail`: label k of a random order has 1/k of the images of the first.
    - `more labels`: the label sets of the encoder's other sets are added.
    - `other images`: fitted to those of another set of the encoder.
    - `broad labels`: each five or twenty labels in a row are one, its text the mean of theirs.
    """
    count, more = len(own.classes), own.everything[len(own.embeds) :]
    splits = [pair for seed in range(seeds) for pair in _both_ways(halves(len(own.embeds), seed))]
    for fit, scored in splits:
        rows = torch.cat([fit, more])
        yield Scenario("even", own, rows, own, scored)
        yield Scenario("the same rows", own, fit, own, fit)
        for number in ROWS_PER_LABEL:
            chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(number))[: number * count]
            if len(chosen) == number * count and number * count >= LEAST_ROWS:
                yield Scenario(f"{number} rows a label", own, rows[chosen], own, scored)
    for fit, scored in splits[:2]:
        yield from _one_sided(own, fit, scored)
    for seed, (fit, scored) in enumerate(splits):
        generator = torch.Generator().manual_seed(seed)
        for part in (0.5, 0.2):
            shown = torch.randperm(count, generator=generator)[: max(2, round(part * count))]
            drawn = [rows[torch.isin(own.labels[rows], shown)] for rows in (fit, scored)]
            yield Scenario(f"{part:.0%} of the labels shown", own, drawn[0], own, drawn[1])
        rank, drawn = torch.randperm(count, generator=generator), []
        for rows in (fit, scored):
            most = own.labels[rows].bincount(minlength=count).double().median()
            drawn.append(rows[picked(own.labels[rows], (most / (1 + rank)).ceil().long().tolist(), generator)])
        yield Scenario("long tail", own, drawn[0], own, drawn[1])
    for other in same_encoder:
        if other is own:
            continue
        yield Scenario(f"other images: {other.name}", other, other.everything, own, torch.arange(len(own.embeds)))
        wider = replace(own, classes=torch.cat([own.classes, other.classes]))
        for fit, scored in splits[:2]:
            yield Scenario(f"more labels: {other.name}", own, torch.cat([fit, more]), wider, scored)
    for size in (5, 20):
        if count >= 4 * size:
            texts = normalize(torch.stack([part.mean(0) for part in own.classes.split(size)]), dim=-1)
            broad = replace(own, labels=own.labels // size, classes=texts)
            for fit, scored in splits:
                yield Scenario(f"broad labels, {size} in one", own, torch.cat([fit, more]), broad, scored)


def _both_ways(pair: tuple[torch.Tensor, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [pair, (pair[1], pair[0])]


def _one_sided(own: ImageSet, fit: torch.Tensor, scored: torch.Tensor) -> Iterator[Scenario]:
    count = len(own.classes)
    for share in SHARES:
        for common in own.labels.bincount(minlength=count).topk(min(MOST_COMMON, count)).indices.tolist():
            generator, drawn = torch.Generator().manual_seed(common), []
            for rows in (fit, scored):
                labels = own.labels[rows]
                total = int((labels == common).sum() / share)
                wanted = (total * shares_with(count, share, common)).tolist()
                # Where the others have less than an image each, some of them have one.
                counts = [int(number + torch.rand(1, generator=generator).item()) for number in wanted]
                drawn.append(rows[picked(labels, counts, generator)])
            yield Scenario(f"{share:.0%} of one label", own, drawn[0], own, drawn[1])
            yield Scenario(f"{share:.0%} of one label, scored on even", own, drawn[0], own, scored)
