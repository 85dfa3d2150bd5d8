"""Counted cost against formulas written from the layers' sizes, and what is timed and measured against what must differ."""

import json

import pytest
import torch
from conftest import make_tiny_clip
from toy import make_sae
from transformers import CLIPConfig, CLIPModel

from hf_vs2 import SAEConfig, SAEModel
from hf_vs2.study.cost import count_flops, count_parameters, count_training_flops, measure_cost, peak_memory


def flops_by_hand(clip: CLIPModel, num_classes: int) -> int:
    """Twice the multiply-adds of the patch convolution, the layers, the projection and the class matrix."""
    config, width = clip.config.vision_config, clip.config.vision_config.hidden_size
    patches = (config.image_size // config.patch_size) ** 2
    tokens = patches + 1
    patch = patches * width * config.num_channels * config.patch_size**2
    linear = tokens * (4 * width * width + 2 * width * config.intermediate_size)
    attention = 2 * tokens * tokens * width
    tail = width * clip.config.projection_dim + clip.config.projection_dim * num_classes
    return 2 * (patch + config.num_hidden_layers * (linear + attention) + tail)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_flops_of_a_forward_pass(mode) -> None:
    """Every figure of the cost table hangs on the counter seeing each product, and our formula each sparse sum."""
    clip, sae = make_tiny_clip(), make_sae(hidden_size=32, num_latents=128, top_k=5)
    with mode():
        found = count_flops(clip, sae, num_classes=7)
    assert found["plain"] == flops_by_hand(clip, 7)
    encode, sparse_sum = 2 * 32 * 128, 2 * 5 * 32
    # The reconstruction, which the FVU needs, and the steering vector: two sparse sums.
    assert found["added"] == encode + 2 * sparse_sum and found["added_by_formula"] == 2 * sparse_sum
    assert found["steered"] == found["plain"] + found["added"]
    assert found["added_percent"] == pytest.approx(100 * found["added"] / found["plain"])
    assert found["attention"] == 3 * 4 * 17 * 17 * 32


@pytest.mark.parametrize(("top_k", "sparse"), [(5, True), (40, False)])
def test_flops_of_training(top_k: int, sparse: bool) -> None:
    """The sparse sums are a claim of this package: their count must be that of the products really made, and the dense
    products' where those are taken."""
    config = SAEConfig(hidden_size=32, num_latents=128, top_k=top_k)
    with torch.inference_mode():  # as the study measures
        found = count_training_flops(config)
    dense, sparse_sum = 2 * 32 * 128, 2 * top_k * 32
    bias_to_center = 2 * 32 * 128 / 256  # once a batch of 256
    if sparse:
        # Forward: encode, decode. Backward: the values' gradient, W_dec's and W_enc's.
        assert found["per_sample"] == dense + 4 * sparse_sum + bias_to_center
        assert found["added_by_formula"] == 4 * sparse_sum
    else:
        assert found["per_sample"] == 5 * dense + bias_to_center
        assert found["added_by_formula"] == 0
    assert found["dense_encoder"] == 3 * dense


def test_paper_scale_adds_less_than_a_tenth_of_a_percent() -> None:
    """The paper's claim for ViT-B/32 (+0.054 %, 4.72 M parameters) in our counting: an encoder product, two sparse sums."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    # One layer of the true width is run; the other eleven are the same again.
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={"num_hidden_layers": 1})).eval()
    sae = SAEModel(SAEConfig(hidden_size=768, expansion_factor=4, top_k=64))
    found = count_flops(clip, sae)
    assert found["plain"] == flops_by_hand(clip, 100)
    clip.config.vision_config.num_hidden_layers = 12
    whole = flops_by_hand(clip, 100)
    assert whole / 1e9 == pytest.approx(8.7295, rel=0.011)
    # Without attention's products, which counters by module leave out, it is the paper's figure to 0.05 %.
    assert (whole - 12 * found["attention"]) / 1e9 == pytest.approx(8.7295, rel=5e-4)
    assert 100 * found["added"] / whole == pytest.approx(0.054, abs=0.003)
    parameters = count_parameters(clip, sae)["sae"]
    assert parameters == 2 * 768 * 3072 + 3072 + 768 and parameters / 1e6 == pytest.approx(4.72, abs=0.005)


@pytest.mark.slow
def test_whole_measurement_and_the_memory_of_an_sae() -> None:
    """Processes of their own must tell plain from steered memory (a child on Linux inherits its parent's getrusage mark), leave
    both models as they were, and give what a result file can hold."""
    clip = make_tiny_clip()
    sae = make_sae(hidden_size=32, num_latents=400_000)
    before = {name: value.clone() for name, value in (clip.state_dict() | sae.state_dict()).items()}
    keep = torch.ones(250_000_000, dtype=torch.uint8)  # a parent larger than its children
    found = json.loads(json.dumps(measure_cost(clip, sae, batch_size=2, num_classes=3, repeats=4)))
    del keep
    weights = sum(tensor.nbytes for tensor in sae.parameters())
    memory = found["memory"]
    assert weights < memory["added"] < 1.5 * weights
    assert memory["steered"] - memory["plain"] == memory["added"]
    low, high = found["time"]["ratio_iqr"]
    assert low <= found["time"]["ratio"] <= high and found["time"]["pairs"] == 4
    # 25 million weights against a CLIP of a few thousand.
    assert found["time"]["steered_ms"] > found["time"]["plain_ms"] and low > 1
    assert found["batch_size"] == 2 and found["image_size"] == 32
    after = clip.state_dict() | sae.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in (*clip.parameters(), *sae.parameters()))


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_on_a_gpu() -> None:
    """On a GPU both are measured in one process: plain CLIP must not be charged for the SAE's weights."""
    clip, sae = make_tiny_clip().cuda(), make_sae(hidden_size=32, num_latents=400_000).cuda()
    found = peak_memory(clip, sae)
    assert found is not None
    assert found["added"] >= sum(tensor.nbytes for tensor in sae.parameters()) > found["plain"]


def test_nothing_to_repeat_is_refused() -> None:
    """A median of no pairs would end in a message of the statistics module."""
    with pytest.raises(ValueError, match="repeats must be a whole number from 1"):
        measure_cost(make_tiny_clip(), make_sae(hidden_size=32), repeats=0)
