"""Commands as the tests of many folders run them, and what they say."""

import json
from pathlib import Path

import numpy as np
import torch
from conftest import make_tiny_clip
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from hf_vs2.cli import COMMANDS, main


COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (200, 50, 40)}
TRAIN = ("--top_k=8", "--max_steps=30", "--per_device_train_batch_size=64", "--disable_tqdm")


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE without merges: every text is its bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def save_clip(path: Path) -> Path:
    """The tiny CLIP with this tokenizer and an image processor."""
    tokenizer = make_tokenizer()
    config: CLIPConfig = make_tiny_clip().config
    config.text_config.vocab_size, config.text_config.max_position_embeddings = len(tokenizer), 40
    for name in ("bos", "eos", "pad"):
        setattr(config.text_config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    clip = CLIPModel(config)
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (clip, tokenizer, processor):
        part.save_pretrained(path)
    return path


def save_images(root: Path) -> Path:
    """Squares of three colours with noise, `root/SPLIT/COLOUR/NUMBER.png`."""
    generator = np.random.default_rng(0)
    for split, number in (("train", 40), ("test", 8)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = np.asarray(colour) + generator.integers(-40, 40, size=(32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:02d}.png")
    return root


def source(clip_path: Path, images_path: Path, split: str = "train") -> list[str]:
    return ["--model", str(clip_path), "--dataset", str(images_path), "--split", split]


def run(capsys, *arguments: object) -> str:
    """Standard output of a command that must succeed."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def complaint(capsys, *arguments: object) -> str:
    """The message of a command that must fail as a user's mistake does: status 2, one line, nothing on stdout."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.endswith("\n"), err
    head, _, message = err.strip().partition(": error: ")
    assert head == f"hf-vs2 {arguments[0]}" if arguments and arguments[0] in COMMANDS else head == "hf-vs2"
    return message


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def image_commands(
    clip: Path, checkpoint: Path, data: list[object], out: Path, picture: Path
) -> dict[str, list[object]]:
    """Every command that reads images, by name: `data` are the flags that name a data set, `picture` is a file or, for
    `classify`, a folder; what they write lies below `out`."""
    made = ["--model", clip, *data, "--disable_tqdm", "--output_dir"]
    used = ["--checkpoint", checkpoint, *data, "--disable_tqdm", "--activations_dir", out / "cache"]
    labels = ["--labels", *COLOURS]
    return {
        "extract": ["extract", *made, out / "activations"],
        "train": ["train", *made, out / "sae", "--top_k=4", "--max_steps=5"],
        "evaluate": ["evaluate", *used, "--templates", "single", "--output", out / "results.json"],
        "recommend": ["recommend", *used, *labels],
        "calibrate": ["calibrate", *used, "--output_dir", out / "calibrated"],
        "atlas": ["atlas", *used, "--output", out / "atlas"],
        "classify": ["classify", picture, "--checkpoint", checkpoint, *labels, "--json"],
        "explain": ["explain", picture, "--checkpoint", checkpoint, *labels, "--json"],
    }


def with_checkpoint(command: str, checkpoint: Path, images_path: Path) -> list[object]:
    return [command, "--checkpoint", checkpoint, "--dataset", images_path, "--split", "test", "--disable_tqdm"]


def strictly(text: str):
    """As JavaScript, jq or a database reads it."""

    def fail(name: str):
        raise AssertionError(f"the JSON holds {name}: {text[:300]}")

    return json.loads(text, parse_constant=fail)
