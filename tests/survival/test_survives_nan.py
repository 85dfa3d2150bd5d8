"""NaN is no answer: whatever makes it, each door answers with numbers or refuses in one message that says what to look
at."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import complaint, image_commands, strictly
from toy import make_sae
from trainings import make_trainer
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from hf_vs2 import (
    VS2CLIPForZeroShot,
    calibrate,
    class_embeddings,
    evaluate,
    extract_activations,
    load_images,
    measure_statistics,
    recommend,
    steering_grid,
    zero_shot_classifier,
)
from hf_vs2.atlas import build_atlas
from hf_vs2.cli import main
from hf_vs2.steering.retrieval import embed_images


LABELS = ("red", "green", "blue")


def overflow(linear: torch.nn.Linear) -> None:
    """Weights that are numbers themselves, with outputs beyond float16."""
    with torch.no_grad():
        linear.weight.copy_(6e4 * linear.weight.sign())


class World:
    """A small half-precision CLIP and what goes with it: images, rows, an SAE with statistics, class embeddings."""

    def __init__(self, clip: Path, images: Path, folder: Path):
        self.clip = CLIPModel.from_pretrained(clip, dtype=torch.float16).eval()
        self.tokenizer = CLIPTokenizer.from_pretrained(clip)
        self.processor = CLIPImageProcessorPil.from_pretrained(clip)
        self.images = load_images(images, "test")
        self.picture = str(images / "test" / "red" / "00.png")
        store = extract_activations(self.clip, self.images, folder, image_processor=self.processor, progress=False)
        self.rows = store.tensor()
        self.labels = torch.tensor(self.images["label"])
        self.classes = class_embeddings(self.clip, self.tokenizer, LABELS)
        self.sae = make_sae(32, layer=2)
        self.sae.mean.copy_(self.rows.mean(0))
        calibrate(self.sae, self.rows)
        self.sae.set_domain_statistics(measure_statistics(self.sae, self.rows, clip=self.clip))

    @property
    def model(self) -> VS2CLIPForZeroShot:
        return VS2CLIPForZeroShot(self.clip, self.sae).eval()


@pytest.fixture()
def world(clip_path, images_path, tmp_path):
    return World(clip_path, images_path, tmp_path / "world")


HARMS = {
    "tower": lambda world: overflow(world.clip.vision_model.encoder.layers[2].mlp.fc2),
    "tail": lambda world: overflow(world.clip.visual_projection),
    "text": lambda world: overflow(world.clip.text_projection),
    "temperature": lambda world: world.clip.logit_scale.data.fill_(1000),
    "pixels": lambda world: setattr(world.processor, "image_std", [0.0] * 3),
    "mean": lambda world: setattr(world.processor, "image_mean", [math.nan] * 3),
    "classes": lambda world: world.classes[1].fill_(torch.inf),
    "sae": lambda world: world.sae.W_enc.data.mul_(1e38),
    "image_mean": lambda world: world.sae.domain_statistics.image_mean[3].fill_(torch.nan),
}
OF_IMAGES = ("tower", "tail", "pixels", "mean")


def prototypes(world: World) -> VS2CLIPForZeroShot:
    model = world.model
    model.set_steering(method="distribution_norm")
    return model


def classifier(world: World, model, **options):
    found = zero_shot_classifier(model, tokenizer=world.tokenizer, image_processor=world.processor)
    return found([world.picture], LABELS, **options)


def trained(world: World, folder: Path):
    store = extract_activations(
        world.clip, world.images, folder / "rows", image_processor=world.processor, progress=False
    )
    config = make_sae(32).config
    with torch.enable_grad():
        return make_trainer(folder / "sae", store, model=config, max_steps=2, per_device_train_batch_size=8).train()


def atlas(world: World, folder: Path):
    known = {"labels": world.labels, "class_names": LABELS}
    page = build_atlas(world.model, world.tokenizer, world.rows, world.images, folder / "atlas", **known)
    return (page.parent / "latents.json").read_text()


# Each door: what it does, the harms that it meets (any other leaves it right), and what its message must name.
DOORS = {
    "pipeline": (
        lambda w, f: classifier(w, w.model, return_details=True),
        (*OF_IMAGES, "text", "temperature"),
        "image 0|the prompt|logit_scale",
    ),
    "pipeline of a CLIP": (
        lambda w, f: classifier(w, w.clip),
        (*OF_IMAGES, "text", "temperature"),
        "image 0|the prompt|logit_scale",
    ),
    "pipeline, by labels": (
        lambda w, f: classifier(w, prototypes(w)),
        (*OF_IMAGES, "text", "temperature", "image_mean"),
        "image 0|the prompt|logit_scale|statistics",
    ),
    "pipeline, explain": (
        lambda w, f: classifier(w, w.model, explain=True),
        (*OF_IMAGES, "text", "temperature"),
        "image 0|the prompt|logit_scale",
    ),
    "explain": (
        lambda w, f: w.model.explain(w.picture, LABELS, processor=(w.tokenizer, w.processor)).to_dict(),
        (*OF_IMAGES, "text", "temperature"),
        "the image|the prompt|logit_scale",
    ),
    "explain_from_cls": (
        lambda w, f: w.model.explain_from_cls(w.rows, w.classes, LABELS).to_dict(),
        ("tail", "temperature", "classes"),
        "row 0|the label 'green'|logit_scale",
    ),
    "class_logits": (
        lambda w, f: w.model.class_logits(w.model.image_features_from_cls(w.rows), w.classes),
        ("tail", "temperature", "classes"),
        "row 0|class embeddings|logit_scale",
    ),
    "evaluate": (
        lambda w, f: evaluate(w.model, w.rows, w.labels, LABELS, w.tokenizer, templates="single").rows,
        ("tail", "text", "temperature", "image_mean", "sae"),
        "row 0|the prompt|logit_scale|statistics",
    ),
    "recommend": (
        lambda w, f: str(recommend(w.model, w.rows, w.classes)),
        ("tail", "temperature", "classes"),
        "row 0|class 1|logit_scale",
    ),
    "steering_grid": (
        lambda w, f: steering_grid(w.model, w.rows, w.labels, w.classes, [1.5], [1.0]),
        ("tail", "temperature", "classes"),
        "row 0|class|logit_scale",
    ),
    "build_atlas": (atlas, ("tail", "text", "temperature", "sae"), "row 0|the prompt|logit_scale"),
    "measure_statistics": (
        lambda w, f: measure_statistics(w.sae, w.rows, clip=w.clip).image_mean,
        ("tail", "sae"),
        "row 0",
    ),
    "calibrate": (lambda w, f: calibrate(w.sae, w.rows), ("sae",), "activation row 0"),
    "extract_activations": (
        lambda w, f: extract_activations(w.clip, w.images, f, image_processor=w.processor, progress=False).tensor(),
        ("tower", "pixels", "mean"),
        "image 0|image_mean",
    ),
    "embed_images": (lambda w, f: embed_images(w.clip, w.images, image_processor=w.processor), OF_IMAGES, "image 0"),
    "train": (trained, ("tower", "pixels", "mean"), "image 0|image_mean"),
}


@pytest.mark.parametrize("harm", HARMS)
@torch.no_grad()
def test_no_door_answers_with_nan(harm, world, tmp_path):
    """Somebody whose CLIP overflows, or whose files are damaged, must learn which, not get a label with a score of nan."""
    HARMS[harm](world)
    for name, (door, harms, names) in DOORS.items():
        folder = tmp_path / name.replace(" ", "_")
        if harm in harms:
            with pytest.raises(ValueError, match=names) as refused:
                pytest.fail(f"{name}: {str(door(world, folder))[:300]}")
            assert "\n" not in str(refused.value), name
        elif harm == "sae":  # steering fails: every image has plain CLIP's answer
            assert "nan" not in str(door(world, folder)), name


@pytest.fixture()
def half(clip_path, tmp_path):
    """A folder with the CLIP in half precision; `write(clip)` puts it there."""
    clip = CLIPModel.from_pretrained(clip_path, dtype=torch.float16)
    for part in (CLIPTokenizer, CLIPImageProcessorPil):
        part.from_pretrained(clip_path).save_pretrained(tmp_path / "clip")

    def write(harm) -> Path:
        HARMS[harm](SimpleNamespace(clip=clip))
        clip.save_pretrained(tmp_path / "clip")
        return tmp_path / "clip"

    return write


def commands(folder: Path, sae: Path, images: Path, out: Path) -> dict[str, list[object]]:
    data = ["--dataset", images, "--split", "test"]
    found = image_commands(folder, sae, data, out, images / "test" / "red" / "00.png")
    for name, file in (("classify", "c.json"), ("explain", "e.png"), ("recommend", "a.json")):
        found[name] += ["--output", out / file]
    return {name: [*words, *(["--clip", folder] if "--checkpoint" in words else [])] for name, words in found.items()}


@pytest.mark.parametrize(
    ("harm", "expected"), [("tower", "00.png"), ("text", "a photo of a blue"), ("temperature", "logit_scale")]
)
def test_classify_names_the_image_or_the_prompt(harm, expected, half, checkpoint, images_path, tmp_path, capsys):
    """Exit status 0 and `red nan` went on into other people's programs."""
    words = commands(half(harm), checkpoint, images_path, tmp_path)["classify"]
    assert expected in complaint(capsys, *words)
    assert not (tmp_path / "c.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["tower", "tail", "text", "temperature"])
def test_every_command_refuses_or_is_right(harm, half, checkpoint, images_path, tmp_path, capsys):
    """The same through the command line, from files: status 2 with one line and nothing written, or valid numbers."""
    meets = {
        "tower": set(commands(Path(), Path(), Path(), Path())),
        "tail": {"classify", "explain", "evaluate", "recommend", "atlas", "calibrate"},
        "text": {"classify", "explain", "evaluate", "recommend", "atlas"},
        "temperature": {"classify", "explain", "evaluate", "recommend", "atlas"},
    }[harm]
    folder = half(harm)
    for name, words in commands(folder, checkpoint, images_path, tmp_path).items():
        if name in meets:
            complaint(capsys, *words)
        else:
            status = main([str(word) for word in words])
            out, err = capsys.readouterr()
            assert status == 2 or "nan" not in out.lower()
    for path in tmp_path.rglob("*.json"):
        if "tokenizer" not in path.name:
            strictly(path.read_text())
    written = {path.name for path in tmp_path.iterdir()}
    assert not written & {"c.json", "e.png", "results.json", "a.json", "atlas"}, written
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "vs2_sae"
