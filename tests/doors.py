"""The doors through which images come in: one table, which tests/test_every_door.py holds to one set of properties."""

import base64
import contextlib
import functools
import io
import json
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil
from transformers.pipelines.pt_utils import KeyDataset

import hf_vs2
from hf_vs2 import ActivationStore, VS2CLIPForZeroShot, extract_activations, load_images
from hf_vs2.cli import main
from hf_vs2.data import open_image
from hf_vs2.encoders.processing import load_processing
from hf_vs2.steering.retrieval import embed_images


SPACE = Path(__file__).parents[1] / "examples" / "space"
LABELS = ["cat", "dog"]


class Failed(Exception):
    """A command ended with status 2; the message is its one line."""


def command(*words: object) -> str:
    """What a command prints that ends well."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    if status == 0:
        return out.getvalue()
    assert status == 2 and not out.getvalue(), err.getvalue()
    head, colon, message = err.getvalue().partition(": error: ")
    assert colon and head == f"hf-vs2 {words[0]}" and message.count("\n") == 1, err.getvalue()
    raise Failed(message.strip())


class World:
    """A steered CLIP that lets every image pass, and its checkpoint with everything in it."""

    def __init__(self, checkpoint: Path, clip: Path, out: Path):
        self.clip, self.out, self.checkpoint = clip, out, out / "checkpoint"
        self.model = VS2CLIPForZeroShot.from_pretrained(checkpoint, gate=None)
        self.tokenizer, self.processor = load_processing(clip)
        self.model.save_pretrained(self.checkpoint, full=True)
        for part in (self.tokenizer, self.processor):
            part.save_pretrained(self.checkpoint)
        self.classifier = hf_vs2.zero_shot_classifier(str(self.checkpoint), device="cpu")

    @torch.no_grad()
    def expected(self, shown: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """What the model makes of these pixels, by its own modules."""
        assert isinstance(self.processor, CLIPImageProcessorPil)
        pixels = self.processor([Image.fromarray(one) for one in shown], return_tensors="pt")["pixel_values"]
        found = self.model.image_features(pixels, with_plain=True)
        return {"fvu": found.fvu, "steered": found.features, "plain": normalize(found.plain_features, dim=-1)}

    @torch.no_grad()
    def fvu_of(self, store: ActivationStore) -> torch.Tensor:
        return self.model.image_features_from_cls(store.tensor()).fvu


class Door(NamedTuple):
    """`answer(world, given)`: numbers of each image that is `given` (paths, or a folder), of the kind that it `gives`.
    A door that loads a model for each image is asked for one image in `step`."""

    answer: Callable[..., Any]
    gives: str = "fvu"
    step: int = 1


def classified(**options: Any) -> Callable[[World, Any], list[float]]:
    def answer(world: World, images: Any) -> list[float]:
        return [found["fvu"] for found in world.classifier(images, LABELS, return_details=True, **options)]

    return answer


def column(paths: Sequence[Path]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"image": list(map(str, paths))}).cast_column("image", datasets.Image())


def explained(world: World, images: Any) -> torch.Tensor:
    return world.model.explain(images, LABELS, processor=(world.tokenizer, world.processor)).fvu


def encoded_images(world: World, images: Any) -> Any:
    return world.model.encode_images(images, processor=(world.tokenizer, world.processor))


def in_the_space(world: World, paths: Sequence[Path]) -> list[float]:
    sys.path.insert(0, str(SPACE))
    try:
        from playground import Playground
    finally:
        sys.path.remove(str(SPACE))
    page = Playground(world.checkpoint)
    return [page.explain(path.read_bytes(), tuple(LABELS), 1.5, 2.0, False).fvu.item() for path in paths]


def asked(name: str, *images: object, flags: Sequence[object] = ()) -> Callable[[World], list[float]]:
    def answer(world: World) -> list[float]:
        found = json.loads(
            command(name, *images, "--checkpoint", world.checkpoint, "--labels", *LABELS, "--json", *flags)
        )
        return [one["fvu"] for one in (found if isinstance(found, list) else [found])]

    return answer


def from_the_web(world: World, paths: Sequence[Path]) -> list[float]:
    root = world.out / "photos"
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        try:
            return asked("classify", *(f"{address}/{quote(str(one.relative_to(root)))}" for one in paths))(world)
        finally:
            server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Silent."""


# Images one by one, as files.
OF_FILES = {
    "pipeline, paths": Door(lambda w, paths: classified()(w, paths)),
    "pipeline, one after another": Door(
        lambda w, paths: [w.classifier(str(one), LABELS, return_details=True)["fvu"] for one in paths]
    ),
    "pipeline, a stream": Door(lambda w, paths: classified()(w, iter(map(str, paths)))),
    "pipeline, bytes": Door(lambda w, paths: classified()(w, [one.read_bytes() for one in paths])),
    "pipeline, memory": Door(lambda w, paths: classified()(w, [memoryview(one.read_bytes()) for one in paths])),
    "pipeline, base64": Door(
        lambda w, paths: classified()(w, [base64.b64encode(one.read_bytes()).decode() for one in paths])
    ),
    "pipeline, addresses": Door(lambda w, paths: classified()(w, [one.absolute().as_uri() for one in paths])),
    "pipeline, rows": Door(
        lambda w, paths: classified(batch_size=4)(w, [{"bytes": None, "path": str(one)} for one in paths])
    ),
    "pipeline, a column": Door(lambda w, paths: classified()(w, column(paths)["image"])),
    "pipeline, KeyDataset": Door(lambda w, paths: classified()(w, KeyDataset(column(paths), "image"))),
    "pipeline, PIL": Door(lambda w, paths: classified()(w, [Image.open(one) for one in paths])),
    "pipeline, opened before": Door(lambda w, paths: classified()(w, [open_image(one) for one in paths])),
    "pipeline, arrays": Door(lambda w, paths: classified()(w, [np.asarray(open_image(one)) for one in paths])),
    "pipeline, tensors": Door(
        lambda w, paths: classified()(
            w, [torch.tensor(np.asarray(open_image(one)) / 255, requires_grad=True) for one in paths]
        )
    ),
    "explain, paths": Door(lambda w, paths: explained(w, list(map(str, paths)))),
    "explain, a column": Door(lambda w, paths: explained(w, column(paths)["image"])),
    "encode_images, paths": Door(encoded_images, "steered"),
    "encode_images, PIL": Door(lambda w, paths: encoded_images(w, (Image.open(one) for one in paths)), "steered"),
    "encode_images, a data set": Door(lambda w, paths: encoded_images(w, column(paths)), "steered"),
    "embed_images": Door(
        lambda w, paths: embed_images(w.model.clip, column(paths), image_processor=w.processor), "plain"
    ),
    "extract_activations": Door(
        lambda w, paths: w.fvu_of(
            extract_activations(
                w.model.clip, column(paths), w.out / "rows", image_processor=w.processor, progress=False
            )
        )
    ),
    "the Space": Door(in_the_space),
    "classify": Door(lambda w, paths: asked("classify", *paths, flags=["--batch_size", 4])(w)),
    "classify, the web": Door(lambda w, paths: from_the_web(w, paths)),
    "explain, the command": Door(
        lambda w, paths: [number for one in paths for number in asked("explain", one)(w)], step=5
    ),
}


def extracted(stream: bool = False, **options: Any) -> Callable[..., torch.Tensor]:
    def answer(world: World, folder: Path, on_error: str) -> torch.Tensor:
        rows = load_images(folder, streaming=stream)
        store = extract_activations(
            world.model.clip, rows, world.out / "rows", image_processor=world.processor, on_error=on_error,
            progress=False, **options,
        )  # fmt: skip
        return world.fvu_of(store)

    return answer


def by_command(name: str, *flags: object, output: str = "--output_dir") -> Callable[..., torch.Tensor]:
    """The rows of the one store that a command has made or used."""

    def answer(world: World, folder: Path, on_error: str) -> torch.Tensor:
        cache, own = world.out / f"{name} cache {on_error}", world.out / name
        model = (
            ["--checkpoint", world.checkpoint]
            if output != "--output_dir" or name == "calibrate"
            else ["--model", world.clip]
        )
        places = [output, cache if name == "extract" else own]
        places += [] if name in ("extract", "adapt") else ["--activations_dir", cache]
        command(name, *model, "--dataset", folder, "--on_error", on_error, "--disable_tqdm", *flags, *places)
        stores = list((own if name == "adapt" else cache).rglob("index.json"))
        (first, *others) = [world.fvu_of(ActivationStore.open(store.parent)) for store in stores]
        assert all(torch.equal(first, other) for other in others)
        return first

    return answer


FEW = ["--top_k=4", "--max_steps=2", "--per_device_train_batch_size=4"]
# Images of a folder, stopped at a broken one or with it left out: `answer(world, folder, on_error)`.
OF_FOLDERS = {
    "extract_activations": Door(extracted()),
    "extract_activations, a stream": Door(extracted(stream=True, num_workers=1)),
    "classify": Door(lambda w, folder, on_error: asked("classify", folder, flags=["--on_error", on_error])(w)),
    "extract": Door(by_command("extract")),
    "train": Door(by_command("train", *FEW)),
    "evaluate": Door(by_command("evaluate", "--templates", "single", "--method", "vs2", output="--output")),
    "recommend": Door(by_command("recommend", "--labels", *LABELS, output="--output")),
    "calibrate": Door(by_command("calibrate")),
    "atlas": Door(by_command("atlas", output="--output")),
    "adapt": Door(by_command("adapt", "--labels", *LABELS)),
}
