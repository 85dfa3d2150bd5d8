"""A steered CLIP in the hands of other libraries: compiled, with an adapter, quantised, offloaded, spread by a device map; and
loading options that CLIPModel takes."""

import copy
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from PIL import Image
from torch import nn
from toy import make_sae
from transformers import AutoModel, AutoModelForZeroShotImageClassification, CLIPModel, pipeline

import hf_vs2
from hf_vs2 import SAEModel, VS2CLIPForZeroShot
from hf_vs2.encoders.base_model import describe_base_model
from hf_vs2.encoders.processing import load_processing


CLIP_PATH = str(Path(hf_vs2.__file__).parent / "demo_assets")
TASK = "zero-shot-image-classification"
LABELS = ["three", "a zero", "nine of them"]
IMAGE = Image.linear_gradient("L").resize((28, 28)).convert("RGB")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """One SAE and its CLIP as an SAE checkpoint, light and full."""
    folder = tmp_path_factory.mktemp("checkpoints")
    clip = CLIPModel.from_pretrained(CLIP_PATH, dtype=torch.float32)
    sae = make_sae(96, layer=2, top_k=8, gate=None, **describe_base_model(clip))
    sae.save_pretrained(folder / "sae")
    model = VS2CLIPForZeroShot(clip, sae)
    model.save_pretrained(folder / "light")
    model.save_pretrained(folder / "full", full=True)
    return folder


KINDS = pytest.mark.parametrize("kind", ["sae", "light", pytest.param("full", marks=pytest.mark.slow)])


def load(folders: Path, kind: str = "light", **options):
    return VS2CLIPForZeroShot.from_pretrained(folders / kind, **options)


def scores(model, **options) -> torch.Tensor:
    answers = hf_vs2.zero_shot_classifier(model, **options)(IMAGE, LABELS)
    return torch.tensor([one["score"] for one in sorted(answers, key=lambda one: one["label"])])


def assert_same(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("of", ["vs2", "clip"])
@pytest.mark.parametrize("wrap", ["compile", "data parallel", "peft"])
def test_the_pipeline_runs_a_wrapped_model(folders, of, wrap):
    """It ran in transformers' pipeline and was refused, or failed at the first image, in ours. An adapter counts."""
    model = load(folders)
    model = model if of == "vs2" else model.clip
    if wrap == "peft":
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
        with_adapter = scores(wrapped)
        merged = wrapped.merge_and_unload()
        assert_same(with_adapter, scores(merged))
        assert (with_adapter - scores(load(folders, "full") if of == "vs2" else load(folders).clip)).abs().max() > 1e-4
        return
    wrapped = torch.compile(model, backend="eager") if wrap == "compile" else nn.DataParallel(model)
    assert_same(scores(wrapped), scores(model))
    classifier = hf_vs2.zero_shot_classifier(model)
    classifier.model = wrapped
    answers = classifier(IMAGE, LABELS, explain=of == "vs2", return_details=True)
    assert answers["predictions"][0]["score"] == pytest.approx(scores(model).max().item(), abs=1e-5)


def test_a_wrapped_clip_is_steered(folders):
    """`VS2CLIPForZeroShot(torch.compile(clip), sae)` and rows of it."""
    model = load(folders)
    wrapped = torch.compile(model.clip, backend="eager")
    assert_same(scores(VS2CLIPForZeroShot(wrapped, model.sae)), scores(model))
    assert load(folders, clip=wrapped).clip is model.clip


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_a_quantised_model_runs_and_is_saved_light(folders, tmp_path, config):
    """torchao's weights are no plain tensors; a light checkpoint holds none of them, a full one can't."""
    quantization = pytest.importorskip("torchao.quantization")
    model = load(folders)
    quantization.quantize_(model, getattr(quantization, config)())
    assert_same(scores(model), scores(load(folders)), atol=0.05)
    model.save_pretrained(tmp_path / "light")
    assert_same(scores(VS2CLIPForZeroShot.from_pretrained(tmp_path / "light")), scores(load(folders)))
    with pytest.raises(ValueError, match="is quantised .*full=False"):
        model.save_pretrained(tmp_path / "full", full=True)


@pytest.mark.parametrize("of", ["vs2", "clip", "clip inside"])
@pytest.mark.parametrize(
    "offload", [pytest.param(accelerate.cpu_offload, marks=pytest.mark.slow), accelerate.disk_offload]
)
def test_weights_that_accelerate_keeps_elsewhere(folders, tmp_path, of, offload):
    """Steering reads weights outside the modules' own forward, where accelerate's hooks do not bring them."""
    model = load(folders)
    inputs = {"pixel_values": torch.randn(2, 3, 28, 28), "input_ids": torch.tensor([[1, 5, 2], [1, 7, 2]])}
    rows = torch.randn(3, 96)
    expected = scores(model if of != "clip" else model.clip), model(**inputs), model.image_features_from_cls(rows)
    where = {"offload_dir": tmp_path} if offload is accelerate.disk_offload else {}
    away = model if of == "vs2" else model.clip
    offload(away, execution_device=torch.device("cpu"), **where)
    if of == "clip inside":
        model = VS2CLIPForZeroShot(away, model.sae)
    if of != "clip":
        assert_same(model(**inputs).logits_per_image, expected[1].logits_per_image)
        assert_same(model.image_features_from_cls(rows).features, expected[2].features)
        with pytest.raises(ValueError, match="is not in memory .it is offloaded.*load the model whole"):
            model.save_pretrained(tmp_path / "saved")
    assert_same(scores(model if of != "clip" else away), expected[0])


@KINDS
@pytest.mark.parametrize(
    "devices",
    [
        {"": "cpu", "clip.vision_model": "disk", "saes": "disk"},
        {"clip.vision_model": "cpu", "clip": "cpu", "saes.2": "cpu"},
        {"clip": "cpu", "saes": "disk"},
        {"clip": "disk", "saes": "cpu"},
    ],
    ids=str,
)
def test_device_map_by_modules(folders, tmp_path, kind, devices):
    """The parts of a checkpoint are loaded one by one, each with its part of the map."""
    model = load(folders, kind, device_map=devices, offload_folder=tmp_path)
    assert_same(scores(model), scores(load(folders, kind)))
    assert model.sae.W_dec.is_meta == (devices.get("saes") == "disk")


def test_device_map_of_other_modules_is_refused(folders):
    with pytest.raises(ValueError, match="device_map names 'vision_model'; the parts of a steered CLIP are 'clip'"):
        load(folders, device_map={"vision_model": "cpu", "text_model": "cpu"})
    with pytest.raises(ValueError, match="device_map says nothing of 'saes.2'"):
        load(folders, device_map={"clip": "cpu"})


@KINDS
@pytest.mark.parametrize("auto", [VS2CLIPForZeroShot, AutoModelForZeroShotImageClassification])
def test_loading_info(folders, kind, auto):
    """It was taken for a damaged file, or for a model. An SAE checkpoint is a steered CLIP to the Auto class of the task."""
    model, info = auto.from_pretrained(folders / kind, output_loading_info=True)
    assert type(model) is VS2CLIPForZeroShot
    assert info == {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}


@pytest.mark.parametrize("kind", ["sae", "light", "full"])
def test_attention_is_chosen_at_loading_and_afterwards(folders, kind):
    """As of a CLIPModel, in each form that transformers takes, and back; config and model always agree."""

    def of(model):
        config = model.config.clip_config
        assert config is model.clip.config
        return [part._attn_implementation for part in (config, config.vision_config, config.text_config)]

    for given, expected in {
        "eager": ["eager"] * 3,
        ("clip_config", "eager"): ["eager"] * 3,
        ("vision_config", "eager"): ["sdpa", "eager", "sdpa"],
        ("", "eager"): ["sdpa"] * 3,
    }.items():
        model = load(folders, kind, attn_implementation=given if isinstance(given, str) else dict([given]))
        assert of(model) == expected, given
    for given in ("eager", "sdpa", {"clip_config": "eager"}, {"clip_config": "sdpa"}):
        model.set_attn_implementation(given)
        assert of(model) == [given if isinstance(given, str) else given["clip_config"]] * 3


def test_words_of_transformers_own_pipeline(folders):
    """`images=` and `tokenizer_kwargs=` are what code written for the stock pipeline says."""
    classifier = hf_vs2.zero_shot_classifier(folders / "light")
    plain = classifier(IMAGE, LABELS)
    assert classifier(images=IMAGE, candidate_labels=LABELS) == plain
    assert classifier(IMAGE, LABELS, tokenizer_kwargs={"padding": "max_length"})[0]["label"] == plain[0]["label"]
    with pytest.raises(
        ValueError, match="'three' and 'nine of them' are one"
    ):  # and not the embeddings kept from before
        classifier(IMAGE, ["three", "nine of them"], tokenizer_kwargs={"max_length": 3})
    with pytest.raises(ValueError, match="image is missing"):
        classifier(candidate_labels=LABELS)


def test_pipeline_of_an_sae_checkpoint_says_what_to_use(folders):
    """It holds no tokenizer. transformers' own message was a traceback of a page; with the parts given it runs."""
    with pytest.raises(ValueError) as told:
        pipeline(TASK, model=str(folders / "sae"))
    message = str(told.value)
    assert "hf_vs2.zero_shot_classifier(" in message and "\n" not in message
    tokenizer, processor = load_processing(CLIP_PATH)
    classifier = pipeline(TASK, model=str(folders / "sae"), tokenizer=tokenizer, image_processor=processor)
    assert isinstance(classifier.model, VS2CLIPForZeroShot)


@pytest.mark.slow
def test_a_local_checkpoint_without_the_import(folders):
    """transformers said that it is out of date. Now it asks for trust_remote_code=True, with which the checkpoint loads."""
    code = "from transformers import AutoModel; print(type(AutoModel.from_pretrained({!r}, trust_remote_code={})))"
    for kind, name in (("sae", "SAEModel"), ("light", "VS2CLIPForZeroShot")):
        for trust, expected in ((True, name), (None, "trust_remote_code=True")):
            run = [sys.executable, "-c", code.format(str(folders / kind), trust)]
            done = subprocess.run(run, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            assert expected in done.stdout + done.stderr


def test_the_shim_is_no_part_of_the_model(folders):
    """What leads to it stands in config.json, and nowhere in the model: an SAE's in a VS2 checkpoint would lead astray."""
    sae, model = SAEModel.from_pretrained(folders / "sae"), load(folders, "full")
    assert "auto_map" not in sae.config.to_dict() and "auto_map" not in str(model.config.to_dict())
    assert isinstance(AutoModel.from_pretrained(folders / "sae", trust_remote_code=True), SAEModel)
    assert copy.deepcopy(model).config.clip_config is not model.config.clip_config
