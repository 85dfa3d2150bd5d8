"""Everything that is saved: how it is made, saved and read, and the numbers of it that somebody would go on to publish.

A root holds the artefact in `out`, and in `clip` the CLIP that it names, so that both are copied and damaged together.
"""

import contextlib
import functools
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from conftest import make_tiny_clip
from datasets import Dataset
from PIL import Image
from toy import make_rows, make_sae
from transformers import CLIPImageProcessorPil, CLIPModel

from hf_vs2 import RetrievalCorpus, SAEModel, VS2CLIPForZeroShot, calibrate, measure_statistics
from hf_vs2.atlas.writing import atlas_folder
from hf_vs2.data.stores.activations import ActivationStore, extract_activations
from hf_vs2.files.atomic import replace_text
from hf_vs2.files.checkpoint_folder import CheckpointFolder
from hf_vs2.files.report import EvaluationResult


MEMORY = 2 << 30
"""Address space that one load may take on top of what the process has; the artefacts are of some 100 kB."""
Numbers = list[Any]
SHARDS = {"max_shard_size": "30KB"}


class Artefact(NamedTuple):
    """`make(seed)` gives the thing, `save(thing, out)` writes it, `read(out)` gives tensors and numbers."""

    make: Callable[[int], Any]
    save: Callable[[Any, Path], Any]
    read: Callable[[Path], Numbers]
    has_clip: bool = False


# SAEs


@functools.cache
def whole_sae(seed: int) -> SAEModel:
    rows = make_rows(400, 32, seed=seed) * (1 + seed)
    sae = make_sae(32, seed=seed, layer=2, total_variance=40.0, gamma=1.0 + seed)
    calibrate(sae, rows)
    sae.set_domain_statistics(measure_statistics(sae, rows, held_out=torch.arange(300, 400), sketch_rows=20))
    return sae


def bare_sae(seed: int) -> SAEModel:
    return make_sae(32, seed=seed, layer=2)


def save_sae(sae: SAEModel, out: Path, **options: Any) -> None:
    sae.save_pretrained(out, **options)


@torch.no_grad()
def sae_numbers(out: Path) -> Numbers:
    sae = SAEModel.from_pretrained(out)
    found, config, known = sae(make_rows(8, 32)), sae.config, sae.domain_statistics
    statistics = [] if known is None else [known.rows, known.mean, *known.distance_quantiles.values()]
    CheckpointFolder.open(out)
    gate = [sae.fvu_threshold(0.9)] if config.fvu_quantiles else []
    return [sae.W_enc, found.loss, found.reconstruction, found.fvu, config.gamma, config.lambda_, *gate, *statistics]


# VS2 checkpoints


@functools.cache
def whole_model(seed: int) -> VS2CLIPForZeroShot:
    """Everything that a checkpoint can hold."""
    model = steered(whole_sae(seed), gate=0.9, gamma=1.5 + seed)
    model.set_corpus(RetrievalCorpus.from_store(make_rows(30, 32, seed=seed), clip=model.clip))
    with model.steering(method="prototypes+pca+sae"):
        model.steerer.fit_classes(make_rows(2, 24, seed=seed), ("one", "two"))
    return model


def bare_model(seed: int) -> VS2CLIPForZeroShot:
    return steered(bare_sae(seed), gamma=1.5 + seed)


def steered(sae: SAEModel, **settings: Any) -> VS2CLIPForZeroShot:
    model = VS2CLIPForZeroShot(make_tiny_clip(), sae, **settings)
    model.config.base_model_name_or_path = "clip"  # where `vs2_numbers` loads it from
    return model


def save_light(model: VS2CLIPForZeroShot, out: Path) -> None:
    model.save_pretrained(out, full=False)


def save_full(model: VS2CLIPForZeroShot, out: Path, **options: Any) -> None:
    model.save_pretrained(out, full=True, **options)


@torch.no_grad()
def vs2_numbers(out: Path) -> Numbers:
    with contextlib.chdir(out.parent):
        model = VS2CLIPForZeroShot.from_pretrained(out)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, "input_ids": torch.tensor([[5, 6, 98], [7, 8, 98]])}
    numbers = [model.sae.W_enc, model.config.gamma, model(**inputs).logits_per_image]
    has_rows = model.domain_statistics is not None
    for settings in (
        *([{"method": "vs2++", "gate": None, "num_neighbors": 5}] if model.corpus is not None else []),
        *({"method": method, "gate": 0.9} for method in ("prototypes+pca", "corrected+distribution_norm") if has_rows),
    ):
        with model.steering(**settings):
            numbers.append(model(**inputs).logits_per_image)
    return numbers + [part for one in model.fitted_label_sets for part in (one.fit.prototypes, *one.fit.views)]


# The rest


def make_corpus(seed: int) -> RetrievalCorpus:
    return RetrievalCorpus(make_rows(20, 32, seed=seed), make_rows(20, 8, seed=seed), f"an/encoder{seed}")


def corpus_numbers(out: Path) -> Numbers:
    corpus = RetrievalCorpus.from_pretrained(out)
    return [corpus.rows, corpus.embeddings, float(corpus.encoder[-1])]


def save_store(seed: int, out: Path) -> None:
    root = out.with_name("made")
    make_tiny_clip().save_pretrained(root / "clip")
    images = [Image.new("RGB", (32, 32), (20 * i, 255 - 20 * i, 7 * i + seed)) for i in range(10)]
    store = extract_activations(
        CLIPModel.from_pretrained(root / "clip"),
        Dataset.from_dict({"image": images, "label": [i % 2 for i in range(10)]}),
        root / "rows",
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        shard_size=4,
        batch_size=4,
        label_column="label",
        progress=False,
    )
    shutil.move(store.path, out)
    shutil.rmtree(root)


def store_numbers(out: Path) -> Numbers:
    store = ActivationStore.open(out)
    return [store.take(torch.arange(len(store))), store.labels, store.image_indices]


def save_result(seed: int, out: Path) -> None:
    row = {"method": "vs2", "prompts": "single", "top1": 61.5 + seed, "top5": 90.0, "gain": 1.5, "gain_ci": [0.5, 2.5]}
    row |= {"coverage": 0.99, "mean_fvu": 0.25, "n": 1000, "gamma": 1.5, "lambda": 2.1, "tau": 0.4, "seconds": 0.1}
    rows = [row | {"method": "clip", "gain": 0.0}, row]
    EvaluationResult(rows, {"seed": 0}, {"class_names": ["a"]}).to_json(out / "results.json")


def result_numbers(out: Path) -> Numbers:
    result = EvaluationResult.from_json(out / "results.json")
    assert result.table()
    return [row["top1"] for row in result.rows] + [row.get("gain") for row in result.rows]


def save_atlas(number: int, out: Path) -> None:
    with atlas_folder(out) as made:
        (made / "data").mkdir()
        (made / "data" / "0.js").write_text(str(number))
        (made / "latents.json").write_text(json.dumps({"format": "hf_vs2.atlas", "number": number}))


def seed_of(seed: int) -> int:
    return seed


ARTEFACTS = {
    "SAE": Artefact(whole_sae, save_sae, sae_numbers),
    "SAE in shards": Artefact(whole_sae, functools.partial(save_sae, **SHARDS), sae_numbers),
    "SAE without statistics": Artefact(bare_sae, save_sae, sae_numbers),
    "light": Artefact(whole_model, save_light, vs2_numbers, has_clip=True),
    "full": Artefact(whole_model, save_full, vs2_numbers),
    "full in shards": Artefact(whole_model, functools.partial(save_full, **SHARDS), vs2_numbers),
    "light without the rest": Artefact(bare_model, save_light, vs2_numbers, has_clip=True),
    "sparsify": Artefact(whole_sae, SAEModel.save_sparsify, lambda out: [SAEModel.from_sparsify(out).W_enc]),
    "corpus": Artefact(make_corpus, RetrievalCorpus.save_pretrained, corpus_numbers),
    "store": Artefact(seed_of, save_store, store_numbers),
    "results": Artefact(seed_of, save_result, result_numbers),
    "atlas": Artefact(seed_of, save_atlas, lambda out: [json.loads((out / "latents.json").read_text())["number"]]),
    "text": Artefact(
        seed_of,
        lambda seed, out: replace_text(out / "results.json", str(seed)),
        lambda out: [float((out / "results.json").read_text())],
    ),
}


def put(kind: str, root: Path, seed: int = 0) -> Path:
    """Saves an artefact into `root/out`, over what is there."""
    artefact = ARTEFACTS[kind]
    if artefact.has_clip and not (root / "clip").exists():
        make_tiny_clip().save_pretrained(root / "clip")
    artefact.save(artefact.make(seed), root / "out")
    return root / "out"


def same(left: Numbers, right: Numbers) -> bool:
    return len(left) == len(right) and all(
        torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        for one, other in zip(left, right, strict=True)
    )


@contextmanager
def bounded_memory(extra: int = MEMORY) -> Iterator[None]:
    """Allocations beyond it fail, with an error that no test here expects."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if pages is not None:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
