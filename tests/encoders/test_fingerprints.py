"""A CLIP that is not the one that an SAE, rows or a corpus were made with is noticed, whatever part of it was trained."""

import copy
import warnings

import pytest
import torch
from hub_models import CLIP_FILES, make_sae

import hf_vs2
from hf_vs2 import ActivationStore, SAEModel, VS2CLIPForZeroShot
from hf_vs2.encoders.base_model import describe_base_model
from hf_vs2.encoders.loading import load_clip
from hf_vs2.evaluation.inputs import replayable_rows


@torch.no_grad()
def merge_lora(clip, *names, scale=0.05):
    """What `merge_and_unload` leaves: a change of rank 4 in some matrices."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in clip.named_parameters():
        if name.endswith(names):
            down, up = (
                torch.randn(*shape, generator=generator) for shape in ((4, weight.shape[1]), (weight.shape[0], 4))
            )
            change = up @ down
            weight.add_(change * (scale * weight.norm() / change.norm()))


@torch.no_grad()
def shift(clip, *names):
    for name, weight in clip.named_parameters():
        if name.endswith(names):
            weight.add_(0.05 * weight.abs().mean() + 1e-3)


class Adapter(torch.nn.Module):
    """How peft wraps a layer: the layer itself inside, and beside it what is learned."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def wrap(clip):
    attention = clip.vision_model.encoder.layers[0].self_attn
    attention.q_proj = Adapter(attention.q_proj)


RELATIVES = {
    "LoRA on q and v": (lambda clip: merge_lora(clip, "q_proj.weight", "v_proj.weight"), "q_proj.weight is one"),
    "LoRA on one matrix": (
        lambda clip: merge_lora(clip, "vision_model.encoder.layers.1.mlp.fc2.weight"),
        "fc2.weight is one",
    ),
    "biases alone": (lambda clip: shift(clip, "fc1.bias"), "fc1.bias is one"),
    "layer norms alone": (lambda clip: shift(clip, "layer_norm1.weight"), "layer_norm1.weight is one"),
    "patches": (lambda clip: merge_lora_conv(clip), "patch_embedding.weight is one"),
    "positions": (lambda clip: shift(clip, "vision_model.embeddings.position_embedding.weight"), "position_embedding"),
    "the text tower": (
        lambda clip: merge_lora(clip, "text_model.encoder.layers.0.mlp.fc1.weight"),
        "image rows are the same",
    ),
    "the projection": (lambda clip: merge_lora(clip, "visual_projection.weight"), "image rows are the same"),
    "an adapter": (wrap, "with an adapter inside .*lora_A"),
}


@torch.no_grad()
def merge_lora_conv(clip):
    weight = clip.vision_model.embeddings.patch_embedding.weight
    weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("change", RELATIVES)
def test_a_relative_of_the_clip_is_noticed(change, tmp_path):
    """The old mark compares 24 weights, none of which a LoRA moves: rows 60 % away were steered without a word."""
    alter, message = RELATIVES[change]
    clip = load_clip(CLIP_FILES, dtype=torch.float32)
    sae = make_sae(clip)
    alter(clip)
    with pytest.warns(UserWarning, match=message) as caught:
        VS2CLIPForZeroShot(clip, sae)
    assert str(caught[0].message).count(str(CLIP_FILES)) == 2, "both are named"
    sae.config.base_model_weights = None  # as a checkpoint of an earlier version has it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VS2CLIPForZeroShot(clip, sae)


def test_the_same_weights_are_the_same_in_every_precision(tmp_path):
    """Nobody reads a warning that comes with every half-precision load."""
    kinds = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    clips = [load_clip(CLIP_FILES, dtype=torch.float32).to(dtype) for dtype in kinds]
    clips.append(copy.deepcopy(clips[0]))
    layer = clips[-1].vision_model.encoder.layers[0].mlp.fc1  # as bitsandbytes stores one
    layer.weight = torch.nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for recorded in clips[:4]:
            sae = make_sae(recorded)
            for clip in clips:
                VS2CLIPForZeroShot(clip, sae)
    sae.save_pretrained(tmp_path)
    assert (
        SAEModel.from_pretrained(tmp_path).config.base_model_weights
        == describe_base_model(clips[3])["base_model_weights"]
    )


def test_rows_and_corpora_of_the_base_are_noticed_too(checkpoint, clip_path, tmp_path):
    """They are as much of one CLIP as an SAE is. Training takes the mark over from the rows."""
    folder = next((checkpoint / "activations").glob("*/index.json")).parent
    clip = load_clip(clip_path)
    own = describe_base_model(clip)["base_model_weights"]
    store = ActivationStore.open(folder)
    assert (
        SAEModel.from_pretrained(checkpoint).config.base_model_weights == store.metadata["base_model_weights"] == own
    )
    corpus = hf_vs2.RetrievalCorpus.from_store(store)
    corpus.save_pretrained(tmp_path)
    merge_lora(clip, "k_proj.weight")
    with pytest.warns(UserWarning, match="This corpus was made with .*k_proj.weight is one"):
        hf_vs2.RetrievalCorpus.from_pretrained(tmp_path).check_base_model(clip)
    sae = SAEModel.from_pretrained(checkpoint)
    sae.config.base_model_weights = None
    with pytest.warns(UserWarning, match="rows were extracted with .*k_proj.weight is one"):
        replayable_rows(VS2CLIPForZeroShot(clip, sae), store, "rows")
