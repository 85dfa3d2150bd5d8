"""Checkpoints as they lie on the Hub."""

from pathlib import Path

import torch
from loopback_hub import Commit, File, LoopbackHub, Repository
from transformers import CLIPModel

import hf_vs2
from hf_vs2 import SAEConfig, SAEModel, VS2CLIPForZeroShot
from hf_vs2.encoders.base_model import describe_base_model
from hf_vs2.encoders.processing import load_processing


# A real (if tiny) CLIP with its tokenizer and image processor files.
CLIP_FILES = Path(hf_vs2.__file__).parent / "demo_assets"


CLIP_ID = "ada/clip"


LABELS = ["three", "a zero", "nine"]


def upload_clip(name, private=False):
    """As the owner of a CLIP does, with transformers' own means; the demo's float16 weights in float32."""
    CLIPModel.from_pretrained(CLIP_FILES, dtype=torch.float32).push_to_hub(name, private=private)
    for part in load_processing(CLIP_FILES):
        part.push_to_hub(name)
    return CLIPModel.from_pretrained(name)


def make_sae(clip, seed=0, layer=2, **config):
    """Random weights; the gate's quantiles are such that it lets everything pass."""
    torch.manual_seed(seed)
    config = {"fvu_quantiles": {"0.5": 50.0, "0.99": 99.0}, **describe_base_model(clip), **config}
    return SAEModel(SAEConfig(hidden_size=96, top_k=8, layer=layer, **config)).eval()


def make_vs2(clip, **settings):
    return VS2CLIPForZeroShot(clip, make_sae(clip), gate=0.99, **settings)


def sum_of(model):
    return sum(tensor.double().sum() for tensor in model.state_dict().values()).item()


def serve(hub: LoopbackHub, name: str, files: dict[str, File], sha: str | None = None) -> None:
    """A repository as only its owner, or whoever runs the server, can make it."""
    repository = Repository(name)
    if sha is None:
        sha = repository.add(files, "made by the test", None)
    repository.commits[sha] = Commit(sha, files, "made by the test", None)
    repository.branches["main"] = sha
    hub.repositories[name] = repository
