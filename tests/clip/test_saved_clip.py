"""A CLIP that was fine-tuned inside a steered model is saved with it, or the save says that it would be lost."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_clip
from torch import nn
from toy import make_sae
from transformers import CLIPModel, Trainer, TrainingArguments

from hf_vs2 import VS2CLIPForZeroShot


INPUTS = {
    "input_ids": torch.tensor([[5, 6, 98], [7, 8, 98]]),
    "attention_mask": torch.ones(2, 3, dtype=torch.int64),
    "pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture
def model(tmp_path) -> VS2CLIPForZeroShot:
    make_tiny_clip().save_pretrained(tmp_path / "clip")
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    return VS2CLIPForZeroShot(clip, make_sae(32, layer=2, total_variance=40.0)).eval()


def fine_tune(model: VS2CLIPForZeroShot, rate: float = 1e-5) -> None:
    """One step that a person would hardly call one."""
    optimizer = torch.optim.Adam(model.clip.parameters(), lr=rate)
    model(**INPUTS, return_loss=True).loss.backward()
    optimizer.step()


def holds_clip(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["holds_clip"]


@torch.no_grad()
def logits(model: VS2CLIPForZeroShot) -> torch.Tensor:
    return model.eval()(**INPUTS).logits_per_image


def test_a_fine_tuned_clip_is_saved_by_default_again_and_again(model, tmp_path, caplog):
    """A light checkpoint of it would load the CLIP that was fine-tuned from, with other scores and no word."""
    fine_tune(model)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        assert holds_clip(tmp_path / name)
        model = VS2CLIPForZeroShot.from_pretrained(tmp_path / name)
    assert torch.equal(logits(model), logits(VS2CLIPForZeroShot.from_pretrained(tmp_path / "first")))
    assert "The CLIP's weights and settings are not those of" in caplog.text and "They are saved too" in caplog.text


def test_a_light_checkpoint_that_would_lose_weights_is_refused(model, tmp_path):
    """Before anything is written."""
    model.save_pretrained(tmp_path / "vs2")
    before = (tmp_path / "vs2" / "config.json").read_bytes()
    with torch.no_grad():
        model.clip.logit_scale.add_(1e-6)
    with pytest.raises(ValueError, match=r"not those of .*clip.*logit_scale is one.*save it with full=True"):
        model.save_pretrained(tmp_path / "vs2", full=False)
    assert (tmp_path / "vs2" / "config.json").read_bytes() == before


def test_a_clip_of_other_settings_is_saved_by_default(model, tmp_path):
    """As people correct a CLIP that was converted with the wrong activation: under its name lies the one with other
    scores."""
    for part in (model.config.clip_config.text_config, model.config.clip_config.vision_config):
        assert part.hidden_act != "relu"
        part.hidden_act = "relu"
    clip = CLIPModel.from_pretrained(tmp_path / "clip", config=model.config.clip_config)
    model = VS2CLIPForZeroShot(clip, model.sae).eval()
    model.save_pretrained(tmp_path / "vs2")
    assert torch.equal(logits(model), logits(VS2CLIPForZeroShot.from_pretrained(tmp_path / "vs2")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_untouched_clip_is_named(model, tmp_path, dtype):
    """600 MB that everybody has already; also after it was in half precision, and where it came from a full checkpoint."""
    model.to(dtype).save_pretrained(tmp_path / "full", full=True)
    for loaded in (model, model.float(), VS2CLIPForZeroShot.from_pretrained(tmp_path / "full")):
        loaded.save_pretrained(tmp_path / "light")
        assert not holds_clip(tmp_path / "light")


@pytest.mark.parametrize("full", [True, False])
def test_where_the_clip_that_is_named_is_elsewhere_its_weights_are_saved(model, tmp_path, caplog, full):
    """Nobody here can tell whether they are still those of the name: a folder was moved, a cache lies elsewhere."""
    model.save_pretrained(tmp_path / "vs2", full=full)
    loaded = VS2CLIPForZeroShot.from_pretrained(tmp_path / "vs2")
    with torch.no_grad():
        loaded.clip.visual_projection.weight.add_(1.0)
    shutil.rmtree(tmp_path / "clip")
    loaded.save_pretrained(tmp_path / "again")
    assert holds_clip(tmp_path / "again") and "can't be read here" in caplog.text
    assert torch.equal(logits(VS2CLIPForZeroShot.from_pretrained(tmp_path / "again")), logits(loaded))
    loaded.save_pretrained(tmp_path / "light", full=False)  # somebody who knows says so
    assert not holds_clip(tmp_path / "light")


class Lora(nn.Module):
    """A layer with an adapter, as peft makes it."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer, self.lora_A = base_layer, nn.Linear(base_layer.in_features, 2, bias=False)


@pytest.mark.parametrize("full", [None, True, False])
def test_an_adapter_inside_is_refused_when_it_is_saved(model, tmp_path, full):
    """It was saved, and could never be loaded."""
    model.clip.visual_projection = Lora(model.clip.visual_projection)
    with pytest.raises(ValueError, match=r"clip.visual_projection.*is no weight of a CLIP.*merge_and_unload"):
        model.save_pretrained(tmp_path / "vs2", full=full)
    assert not (tmp_path / "vs2").exists()


def test_transformers_trainer_saves_and_resumes_what_it_fine_tuned(model, tmp_path):
    """`Trainer.save_model` and its checkpoints: what is resumed must be what was trained."""

    def trainer(model, steps: int) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=steps, save_steps=2, learning_rate=1e-3, report_to=[],
            disable_tqdm=True, use_cpu=True, seed=0, lr_scheduler_type="constant",
        )  # fmt: skip
        data = [{name: value[0] for name, value in INPUTS.items()}] * 8
        return Trainer(model, arguments, train_dataset=data, data_collator=lambda _: {**INPUTS, "return_loss": True})

    trained = trainer(model, 4)
    trained.train()
    trained.save_model(tmp_path / "saved")
    expected = logits(model)
    assert torch.equal(logits(VS2CLIPForZeroShot.from_pretrained(tmp_path / "saved")), expected)
    fresh = VS2CLIPForZeroShot(
        CLIPModel.from_pretrained(tmp_path / "clip"), make_sae(32, layer=2, total_variance=40.0)
    )
    trainer(fresh, 4).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(logits(fresh), expected)
