"""Exported programs: they keep steering and gate inside, and take any number of images."""

import importlib.util

import pytest
import torch
from steered import LAST, fitted_sae, make_inputs

from hf_vs2 import VS2CLIPForZeroShot, measure_statistics
from hf_vs2.clip.export import ImageSide
from hf_vs2.methods import METHODS
from hf_vs2.steering.corpus import RetrievalCorpus


DYNAMIC = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
EDITS = {"amplify": {3: 2.0}, "suppress": [5], "set": {7: 1.0}}


def classes(model, num=3):
    """Class embeddings of as many prompts."""
    with torch.no_grad():
        embeds = model.get_text_features(make_inputs(texts=num, seed=3)["input_ids"]).pooler_output
    return torch.nn.functional.normalize(embeds, dim=-1)


def steered(clip, layers=(LAST,), **settings):
    saes = {layer: fitted_sae(clip, layer) for layer in layers}
    known = saes[layers[-1]].domain_statistics.rows.float()
    saes[layers[-1]].set_domain_statistics(measure_statistics(saes[layers[-1]], known, held_out=torch.arange(30)))
    return VS2CLIPForZeroShot(clip, saes, **settings)


def exported(side):
    """Traced with 2 images."""
    return torch.export.export(side, (make_inputs(2)["pixel_values"],), dynamic_shapes=DYNAMIC)


SLOW = {"marks": pytest.mark.slow}  # each is a trace of the whole model
CASES = [
    pytest.param({"method": name}, id=name, **SLOW) for name, method in METHODS.items() if not method.needs_corpus
]
CASES += [
    pytest.param({"edits": EDITS}, id="edits", **SLOW),
    pytest.param({"enabled": False}, id="off", **SLOW),
    pytest.param({"layers": (1, LAST)}, id="two layers", **SLOW),
    pytest.param({"gate": None}, id="no gate", **SLOW),
]


@pytest.mark.parametrize("settings", CASES)
def test_any_number_of_images_and_the_same_scores(tiny_clip, settings):
    """`if not len(x)` and `zeros(len(x))` made the number of images a constant: the export failed, or ran with one number of
    images alone. A gate of 0.5 lets some of the images through, so that both ways are in the program."""
    settings = {"gate": 0.5 if settings.get("method") != "none" else None, **settings}
    model = steered(tiny_clip, settings.pop("layers", (LAST,)), **settings)
    side = ImageSide(model, classes(model))
    program = exported(side).module()
    for count in (1, 2, 7):
        pixel_values = make_inputs(count, seed=count)["pixel_values"]
        with torch.no_grad():
            found = program(pixel_values)
            images = model.image_features(pixel_values, class_embeds=side.class_embeds)
            expected = model.class_logits(images, side.class_embeds)
        torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-4)
        assert torch.equal(found.steered, images.steered)


@pytest.mark.slow
def test_the_whole_model_and_the_sae_take_any_batch(tiny_clip):
    """`model` itself, with texts, and an SAE by itself."""
    model = steered(tiny_clip, gate=0.5)
    inputs = make_inputs(2)
    shapes = {"pixel_values": {0: torch.export.Dim.DYNAMIC}, "input_ids": None, "attention_mask": None}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=shapes).module()
        other = make_inputs(5, seed=2)
        torch.testing.assert_close(program(**other).logits_per_image, model(**other).logits_per_image)
        rows = torch.randn(4, 32)
        program = torch.export.export(model.sae, (rows,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}}).module()
        torch.testing.assert_close(program(rows[:3]).reconstruction, model.sae(rows[:3]).reconstruction)


def test_a_search_is_refused(tiny_clip):
    """Before a long trace that would fail."""
    model = steered(tiny_clip)
    model.set_corpus(RetrievalCorpus.from_store(torch.randn(9, 32), clip=tiny_clip))
    model.set_steering(method="vs2++")
    with pytest.raises(ValueError, match="looks for neighbours in a corpus, which can't be exported"):
        ImageSide(model, classes(model))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vs2", "centroid", "none"])
def test_onnx_gives_the_same_scores(tiny_clip, tmp_path, method):
    """The file that people deploy, run by onnxruntime with other numbers of images than it was traced with."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    import onnxruntime

    model = steered(tiny_clip, method=method, gate=0.5 if method != "none" else None)
    side = ImageSide(model, classes(model))
    file = tmp_path / "side.onnx"
    names = {"input_names": ["pixel_values"], "output_names": ["logits", "steered"]}
    pixel_values = make_inputs(2)["pixel_values"]
    torch.onnx.export(side, (pixel_values,), file, dynamo=True, dynamic_shapes=DYNAMIC, **names)
    session = onnxruntime.InferenceSession(file)
    for count in (1, 5):
        pixel_values = make_inputs(count, seed=count)["pixel_values"]
        logits, was_steered = session.run(None, {"pixel_values": pixel_values.numpy()})
        with torch.no_grad():
            expected = side(pixel_values)
        torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=0, atol=1e-4)
        assert was_steered.tolist() == expected.steered.tolist()
