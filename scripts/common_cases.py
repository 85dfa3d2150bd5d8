"""The models and pipelines that transformers' common tests are run over, and what of them does not apply. Run by
`common_tests.py`, which puts the tests of the installed release on the path."""

import unittest

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, pipeline
from transformers_common.test_configuration_common import ConfigTester
from transformers_common.test_modeling_common import ModelTesterMixin

import hf_vs2
from hf_vs2 import SAEConfig, SAEModel, VS2CLIPConfig, VS2CLIPForZeroShot
from hf_vs2.encoders.base_model import describe_base_model


# By model: the beginning of a test's name -> why it does not apply.
NO_TOKENS = "an SAE reads rows: it has no tokens, no embeddings of them and no attention"
TWO_DEEP = "the test sets a flag of the config one level deep, and CLIP's lies two deep: CLIPModel fails it too"
NOT_APPLICABLE = {
    "SAE": {
        "test_hidden_states_output": NO_TOKENS,
        "test_retain_grad_hidden_states_attentions": NO_TOKENS,
        "test_model_get_set_embeddings": NO_TOKENS,
        "test_attention_outputs": NO_TOKENS,
        "test_resize": NO_TOKENS,
        "test_can_load_ignoring_mismatched_shapes": "weights of another shape are refused, never filled in at random",
        "test_mismatched_shapes": "weights of another shape are refused, never filled in at random",
        "test_model_weights_reload_no_missing": "the test puts integers in the place of weights, which is refused",
    },
    "VS2": {
        "test_attention_outputs": "two towers: CLIP's own tests leave it out",
        "test_hidden_states_output": "two towers: CLIP's own tests leave it out",
        "test_retain_grad_hidden_states_attentions": "two towers: CLIP's own tests leave it out",
        "test_model_get_set_embeddings": "two towers: CLIP's own tests leave it out",
        "test_inputs_embeds": "two towers: CLIP's own tests leave it out",
        "test_resize": "two towers: CLIP's own tests leave it out",
        "test_get_text_features_hidden_states": TWO_DEEP,
        "test_get_text_features_attentions": TWO_DEEP,
        "test_get_image_features_hidden_states": TWO_DEEP,
        "test_get_image_features_attentions": TWO_DEEP,
        "test_model_weights_reload_no_missing": "the test puts integers in the place of weights, which is refused",
        "test_model_outputs_equivalence": "the test subtracts booleans (`steered`)",
        "test_eager_matches_sdpa": "top-k is discontinuous: another latent is chosen where attention rounds otherwise",
    },
}


def leave_out(name: str):
    """Decorator: each test that does not apply is skipped with its reason."""

    def mark(case: type) -> type:
        for test in dir(case):
            reason = next((why for start, why in NOT_APPLICABLE[name].items() if test.startswith(start)), None)
            if reason is not None:
                setattr(case, test, unittest.skip(reason)(lambda self: None))
        return case

    return mark


def clip_config() -> CLIPConfig:
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 99, "max_position_embeddings": 32, "eos_token_id": 98, "bos_token_id": 0}
    vision = {**tower, "image_size": 30, "patch_size": 6}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)


class SAETester:
    batched_inputs = ("x",)
    is_training = False
    batch_size = 13

    def get_config(self) -> SAEConfig:
        return SAEConfig(hidden_size=32, expansion_factor=2, top_k=8, total_variance=30.0)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"x": torch.randn(13, 32)}


class VS2Tester:
    batched_inputs = ("pixel_values",)
    is_training = False
    layers = (1,)
    batch_size, seq_length, num_hidden_layers, hidden_size = 3, 7, 2, 32

    def get_config(self) -> VS2CLIPConfig:
        saes = [SAEConfig(hidden_size=32, expansion_factor=2, top_k=8, layer=layer) for layer in self.layers]
        return VS2CLIPConfig(clip_config=clip_config(), sae_configs=saes)

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(1, 97, (self.batch_size, self.seq_length))
        ids[:, -1] = 98
        inputs = {"input_ids": ids, "pixel_values": torch.randn(self.batch_size, 3, 30, 30)}
        return self.get_config(), inputs | {"attention_mask": torch.ones_like(ids)}


class InnerTester(VS2Tester):
    layers = (0, 1)


@leave_out("SAE")
class SAETest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SAEModel,)
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self):
        self.model_tester = SAETester()


@leave_out("VS2")
class VS2Test(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (VS2CLIPForZeroShot,)
    additional_model_inputs = ["pixel_values"]
    test_resize_embeddings = False
    _is_composite = True
    has_attentions = False

    def setUp(self):
        self.model_tester = VS2Tester()


class InnerTest(VS2Test):
    """SAEs on both layers."""

    def setUp(self):
        self.model_tester = InnerTester()


class ConfigTest(unittest.TestCase):
    all_model_classes = ()

    def test_sae(self):
        self.model_tester = SAETester()
        ConfigTester(
            self, config_class=SAEConfig, has_text_modality=False, common_properties=["hidden_size"], hidden_size=32
        ).run_common_tests()

    def test_vs2(self):
        self.model_tester = VS2Tester()
        tester = ConfigTester(self, config_class=VS2CLIPConfig, has_text_modality=False, common_properties=[])
        tester.run_common_tests()


# transformers' own pipeline over checkpoints, as its tests of zero-shot image classification ask


@pytest.fixture(scope="module", params=["clip", "light", "full"])
def checkpoint(request, tmp_path_factory) -> str:
    assets = hf_vs2.__path__[0] + "/demo_assets"
    if request.param == "clip":
        return assets
    clip = CLIPModel.from_pretrained(assets, dtype=torch.float32)
    sae = SAEModel(SAEConfig(hidden_size=96, top_k=8, gate=None, **describe_base_model(clip)))
    folder = tmp_path_factory.mktemp(request.param)
    VS2CLIPForZeroShot(clip, sae).save_pretrained(folder, full=request.param == "full")
    return str(folder)


@pytest.mark.parametrize("task", ["zero-shot-image-classification", "vs2-zero-shot-image-classification"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_zero_shot_pipeline(checkpoint, task, dtype):
    classifier = pipeline(task, model=checkpoint, dtype=dtype, device="cpu")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (28, 28, 3), dtype=np.uint8))
    answers = classifier([image] * 5, candidate_labels=["a", "b", "c"], batch_size=2)
    assert len(answers) == 5
    for answer in answers:
        assert sorted(one["label"] for one in answer) == ["a", "b", "c"]
        assert sum(one["score"] for one in answer) == pytest.approx(1, abs=1e-2)
        assert [one["score"] for one in answer] == sorted((one["score"] for one in answer), reverse=True)
    one = classifier(image, candidate_labels=["a", "b", "c"])
    assert [part["label"] for part in one] == [part["label"] for part in answers[0]]
