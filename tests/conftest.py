"""Fixtures shared by the suite: a tiny random CLIP, and the real material that some checkouts have beside them."""

import atexit
import builtins
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from loopback_hub import LoopbackHub


# The suite never leaves the machine: its Hub is on 127.0.0.1, and it has a cache of its own. huggingface_hub reads the address
# when it is imported, so this comes before that.
HUB = LoopbackHub().__enter__()
CACHE = tempfile.mkdtemp(prefix="hf_vs2-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ASSETS_CACHE", "HF_MODULES_CACHE", "HF_TOKEN_PATH"):
    os.environ.pop(name, None)
os.environ.update(HUB.environment(CACHE))
# Triton reads this when it is imported: its kernels are tested on the CPU where there is nothing else.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Convolutions that round to 10 bits would hide what is compared here.
torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session", autouse=True)
def sae_back_on_the_cpu() -> Iterator[None]:
    """Where there is a GPU, an SAE is on it after training; what the tests hold against it is not."""
    if not torch.cuda.is_available():
        yield
        return
    from hf_vs2 import SAETrainer

    train = SAETrainer.train

    def train_and_return(trainer: SAETrainer) -> dict[str, float]:
        metrics = train(trainer)
        trainer.model.cpu()
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SAETrainer, "train", train_and_return)
        yield


@pytest.fixture(scope="session", autouse=True)
def messages_reach_pytest() -> None:
    """Ours go where those of transformers go, which are its own affair by default: `caplog` would not see them."""
    from transformers.utils import logging

    logging.enable_propagation()


@pytest.fixture()
def take_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From then on a library can't be imported, as where it is not installed."""
    original = builtins.__import__

    def take(library: str) -> None:
        def without(name, *args, **kwargs):
            if name.partition(".")[0] == library:
                raise ImportError(name)
            return original(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)

    return take


@pytest.fixture()
def no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """From then on an image that is read fails the test: hours into an extraction is too late for most messages."""
    for module in ("batches", "inputs"):
        monkeypatch.setattr(f"hf_vs2.data.{module}.open_image", lambda *_, **__: pytest.fail("an image was read"))


@pytest.fixture()
def hub() -> Iterator[LoopbackHub]:
    """The Hub that every client in this process, and in those it starts, talks to."""
    HUB.faults.clear()
    yield HUB
    left = [fault.pattern for fault in HUB.faults]
    HUB.faults.clear()
    assert not left, f"no request met these faults: {left}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real encoders and images that developers keep beside the checkout (users do not have it)."""
    folder = Path(os.environ.get("HF_VS2_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real material not found at {folder}; set HF_VS2_SHARED_DATA to a folder that has it")
    return folder


def make_tiny_clip(num_layers: int = 3):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text |= {"vocab_size": 99, "max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 98, "pad_token_id": 1}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": num_layers, "num_attention_heads": 4}
    vision |= {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    # Larger weights than CLIP's initialisation, so that images differ visibly in the CLS row.
    clip = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return clip


@pytest.fixture()
def tiny_clip():
    """A random CLIP small enough for any test: hidden 32, 3 layers, 32-pixel images, projection 24."""
    return make_tiny_clip()


@pytest.fixture(scope="session")
def clip_path(tmp_path_factory) -> Path:
    """A saved CLIP with everything beside it that a Hub repository has."""
    from commands import save_clip

    return save_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="session")
def images_path(tmp_path_factory) -> Path:
    """A folder of images as people keep them: train and test, a folder a class."""
    from commands import save_images

    return save_images(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, clip_path, images_path) -> Path:
    """What `hf-vs2 train` leaves behind."""
    from commands import TRAIN, main, source

    path = tmp_path_factory.mktemp("outputs") / "sae"
    assert main(["train", *source(clip_path, images_path), "--output_dir", str(path), *TRAIN]) == 0
    return path


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[..., Path]:
    """The root of an artefact of a seed (see `artefacts`), made once: nobody changes it."""
    from artefacts import put  # which imports this file

    made: dict[tuple[str, int], Path] = {}

    def make(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            made[kind, seed] = tmp_path_factory.mktemp("saved")
            put(kind, made[kind, seed], seed)
        return made[kind, seed]

    return make


@pytest.fixture()
def copied(saved, tmp_path) -> Callable[..., Path]:
    """The folder `out` in a fresh copy of an artefact's root."""

    def make(kind: str, seed: int = 0) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return shutil.copytree(saved(kind, seed), tmp_path / "copy") / "out"

    return make
