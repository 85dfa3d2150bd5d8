"""Small CLIPs with SAEs whose figures are of ordinary size, and rows and classes for them."""

import numpy as np
import torch
from conftest import make_tiny_clip
from hub_models import CLIP_FILES
from PIL import Image
from torch.nn.functional import normalize
from toy import make_sae
from transformers import CLIPModel

from hf_vs2 import VS2CLIPForZeroShot, calibrate, measure_statistics
from hf_vs2.functional.label_free import norm_fit
from hf_vs2.methods import METHODS, Method, register, then


HIDDEN, LATENTS, LAST = 32, 128, 2


def make_inputs(batch=4, texts=3, seed=0):
    """Images and prompts for the tiny CLIP (98 is its end-of-text token)."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, 98, (texts, 7), generator=generator)
    input_ids[:, -1] = 98
    return {
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
    }


@torch.no_grad()
def cls_rows(clip, pixel_values):
    return clip.vision_model(pixel_values=pixel_values).last_hidden_state[:, 0]


def spread_sae(rows, **config):
    """A random SAE whose `b_pre` and mean sit where these rows are, so that FVUs are spread around 1; calibrated on
    them."""
    sae = make_sae(rows.shape[1], **{"top_k": 8, **config})
    with torch.no_grad():
        sae.b_pre.copy_(rows.mean(0))
        sae.mean.copy_(rows.mean(0) + 0.1)
        sae.W_enc.div_(4)
        sae.W_dec.div_(2)
    calibrate(sae, rows)
    return sae.eval()


def fitted_sae(clip=None, layer=None, **config):
    """With the statistics of 64 random images."""
    rows = cls_rows(clip or make_tiny_clip(), make_inputs(64, seed=5)["pixel_values"])
    sae = spread_sae(rows, layer=layer, **config)
    sae.set_domain_statistics(measure_statistics(sae, rows))
    return sae


def scored_model(clip, rows, seed=0, **settings):
    """With the statistics of four fifths of the rows; the last fifth is held out."""
    sae = spread_sae(rows, seed=seed)
    held_out = torch.arange(len(rows) * 4 // 5, len(rows))
    sae.set_domain_statistics(measure_statistics(sae, rows, held_out=held_out))
    return VS2CLIPForZeroShot(clip, sae, gamma=1.5, lambda_=0.7, **settings).eval()


def scored_tiny(clip):
    """The tiny CLIP with statistics of 80 random images."""
    return scored_model(clip, cls_rows(clip, make_inputs(100, 4, seed=5)["pixel_values"]))


def scored_demo(**settings):
    """The demo's CLIP, whose labels have names: 28-pixel images, 96 wide, 3 layers."""
    clip = CLIPModel.from_pretrained(CLIP_FILES, dtype=torch.float32).eval()
    pixels = torch.randn(60, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    return scored_model(clip, cls_rows(clip, pixels), **settings)


def noise_images(count):
    """Smooth and different, for a CLIP of any size."""
    coarse = np.random.default_rng(0).integers(0, 255, (count, 5, 6, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((48, 40)) for pixels in coarse]


@torch.no_grad()
def classes_of(clip, seed=0, num_classes=4):
    inputs = make_inputs(1, num_classes, seed)
    found = clip.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    return normalize(found, dim=-1)


@torch.no_grad()
def logits(model, rows, classes):
    return model.class_logits(model.image_features_from_cls(rows), classes)


def make_classes(number=4):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(number, 24, generator=generator, dtype=torch.float64)


def assert_same_output(found, expected):
    """Bit for bit, nested outputs included."""
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(found[name], tensor), name
        else:
            assert_same_output(found[name], tensor)


def strongest(batch):
    """The strongest latent's direction is added, the norm is kept."""
    best = batch.values.argmax(-1, keepdim=True)
    return batch.moved(batch.alpha * batch.values.gather(1, best), batch.indices.gather(1, best))


def own_methods():
    """A step, a fit and the two together, as a user would add them; they are not registered yet."""
    facts = {"one_direction": True, "explains": True, "shows": ("gamma", "lambda")}
    register(Method("own_strongest", "strongest latent", step=strongest, **facts))
    register(Method("own_norm", "own norm", fit=lambda classes, rows: norm_fit(classes, 0.5 * rows.mean())))
    then("own_strongest", "own_norm")
    return {name: METHODS.pop(name) for name in ("own_strongest", "own_norm", "own_strongest+own_norm")}
