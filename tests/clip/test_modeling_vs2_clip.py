"""A CLIP with SAEs plugged in: layers, settings, CLIP's interface, copies and checkpoints. What holds for every method
stands in tests/methods/test_every_method.py."""

import copy

import numpy as np
import pytest
import torch
from steered import HIDDEN, LAST, LATENTS, assert_same_output, cls_rows, fitted_sae, make_inputs
from toy import make_sae

from hf_vs2 import VS2CLIPForZeroShot
from hf_vs2.config.latent_edits import LatentEdits
from hf_vs2.functional import equations as functional
from hf_vs2.steering.corpus import RetrievalCorpus


@pytest.fixture()
def sae(tiny_clip):
    return fitted_sae(tiny_clip)


@pytest.fixture()
def model(tiny_clip, sae):
    return VS2CLIPForZeroShot(tiny_clip, sae)


# Plain CLIP, bit for bit


def state_of(clip):
    """Everything a user could see change in a CLIP."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "weights": {name: tensor.clone() for name, tensor in clip.state_dict().items()},
        "config": copy.deepcopy(clip.config.to_dict()),
        "attention": [module.config._attn_implementation for module in clip.modules() if hasattr(module, "config")],
        "modes": {name: module.training for name, module in clip.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in clip.named_parameters()},
        "hooks": {(name, hook): len(getattr(m, hook)) for name, m in clip.named_modules() for hook in hooks},
        "types": {name: type(module) for name, module in clip.named_modules()},
    }


def test_the_clip_given_is_never_changed(tiny_clip, sae):
    """People go on using their CLIP beside the wrapper: same results, no hook, same config, same mode of every part."""
    tiny_clip.vision_model.train()  # a mixed mode, as in training the image side only
    tiny_clip.text_model.requires_grad_(False)
    inputs = make_inputs()
    with torch.no_grad():
        result = tiny_clip(**inputs)
    before = state_of(tiny_clip)

    model = VS2CLIPForZeroShot(tiny_clip, {1: fitted_sae(layer=1), LAST: sae}, gate=0.9)
    with torch.no_grad():
        model(**inputs)
        assert_same_output(tiny_clip(**inputs), result)
    after = state_of(tiny_clip)
    weights, unchanged = after.pop("weights"), before.pop("weights")
    assert after == before
    assert all(torch.equal(weights[name], tensor) for name, tensor in unchanged.items())
    assert model.clip is tiny_clip, "no copy: two CLIPs would not fit in memory"
    assert tiny_clip.config._attn_implementation == "sdpa", "the trap: a composite config resets it"


# The method


def test_last_layer_steering_touches_no_patch_token(model, tiny_clip):
    """`last_hidden_state` is what segmentation heads and attention maps read; there it stays CLIP's."""
    inputs = make_inputs()
    with torch.no_grad():
        plain = tiny_clip(**inputs, output_hidden_states=True)
        found = model(**inputs, output_hidden_states=True)
    vision = found.vision_model_output
    assert torch.equal(vision.last_hidden_state, plain.vision_model_output.last_hidden_state)
    assert not torch.equal(vision.pooler_output, plain.vision_model_output.pooler_output)
    assert len(vision.hidden_states) == LAST + 2
    assert all(map(torch.equal, vision.hidden_states, plain.vision_model_output.hidden_states))


@torch.no_grad()
def hand_written_features(clip, saes, pixel_values, gamma, lambda_):
    """The vision tower with steering at several layers, spelled out as the paper's layer study describes it."""
    vision = clip.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixel_values))
    for index, layer in enumerate(vision.encoder.layers):
        hidden = layer(hidden, None)
        if index in saes:
            row = hidden[:, 0]
            v = functional.steering_vector(*saes[index].encode(row), saes[index].W_dec, gamma)
            hidden = torch.cat([functional.steer(row, v, lambda_)[:, None], hidden[:, 1:]], dim=1)
    return clip.visual_projection(vision.post_layernorm(hidden[:, 0]))


@pytest.mark.parametrize("layers", [(0,), (0, 1), (1, LAST), (0, 1, LAST)])
def test_several_layers_equal_a_hand_written_forward(tiny_clip, layers):
    """The paper's layer study (table of section 4): one SAE a layer, each reading what the layers below made of it."""
    saes = {layer: fitted_sae(tiny_clip, layer=layer, seed=layer) for layer in layers}
    model = VS2CLIPForZeroShot(tiny_clip, saes)
    inputs = make_inputs()
    with torch.no_grad():
        out = model(**inputs)
        features = model.get_image_features(inputs["pixel_values"]).pooler_output
        both = model.image_features(inputs["pixel_values"], with_plain=True)
    expected = hand_written_features(tiny_clip, saes, inputs["pixel_values"], 1.5, 2.1)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(out.vision_model_output.pooler_output, features) and torch.equal(both.features, features)
    if len(layers) > 1:
        assert out.fvu.shape == out.steered.shape == (4, len(layers))
        assert [values.shape for values in out.latent_values] == [(4, 8)] * len(layers)
    with pytest.raises(ValueError, match="Layers .* are steered too; only the last layer's steering can be replayed"):
        model.image_features_from_cls(torch.zeros(1, HIDDEN))
    with torch.no_grad():
        plain = tiny_clip.get_image_features(inputs["pixel_values"]).pooler_output
        assert torch.equal(both.plain_features, plain)
        for settings in ({"enabled": False}, {"fvu_threshold": 0.0}):  # off, and gated out at every layer
            with model.steering(**settings):
                assert torch.equal(model.get_image_features(inputs["pixel_values"]).pooler_output, plain)


@pytest.mark.parametrize("asked", [True, 1, [0, LAST + 1]])
def test_hidden_states_and_attentions_of_a_model_with_inner_layers(tiny_clip, asked):
    """They are those of the steered tower; with steering that moves nothing CLIP's own, bit for bit. (An int or a list of
    them keeps these states alone, as in newer transformers.)"""
    tiny_clip.set_attn_implementation("eager")
    inputs, flags = make_inputs(), {"output_hidden_states": asked, "output_attentions": True}
    model = VS2CLIPForZeroShot(tiny_clip, fitted_sae(layer=1))
    with torch.no_grad():
        steered = model(**inputs, **flags).vision_model_output
        with model.steering(fvu_threshold=0.0):
            held = model(**inputs, **flags).vision_model_output
        plain = tiny_clip(**inputs, output_hidden_states=True, output_attentions=True).vision_model_output
    assert len(held.hidden_states) == len(plain.hidden_states) and len(held.attentions) == len(plain.attentions)
    chosen = range(LAST + 2) if asked is True else [asked] if isinstance(asked, int) else asked
    for place, (found, moved, expected) in enumerate(
        zip(held.hidden_states, steered.hidden_states, plain.hidden_states, strict=True)
    ):
        if place not in chosen:
            assert found is None
            continue
        assert torch.equal(found, expected)
        assert torch.equal(moved, expected) == (place < 2), "the row is steered in what layer 1 gives"
    for found, expected in zip(held.attentions, plain.attentions, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "gamma", [torch.full((LATENTS,), 1.5), np.full(LATENTS, 1.5), [1.5] * LATENTS, np.float32(1.5), torch.tensor(1.5)]
)
def test_gamma_in_any_form(tiny_clip, sae, gamma):
    """Tensors, arrays and lists come from notebooks; equal factors must be the scalar, and save_pretrained must take them."""
    inputs = make_inputs()
    scalar = VS2CLIPForZeroShot(tiny_clip, sae, gamma=1.5)
    other = VS2CLIPForZeroShot(tiny_clip, sae, gamma=gamma)
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).logits_per_image, scalar(**inputs).logits_per_image)
    assert other.config.steering() == other.steering_settings


# VS2++: neighbours in a corpus


@pytest.fixture()
def searching(tiny_clip, sae):
    """A model with a corpus; each of its images has six neighbours."""
    model = VS2CLIPForZeroShot(tiny_clip, sae, lambda_=0.7, method="vs2++", num_neighbors=6)
    rows = cls_rows(tiny_clip, make_inputs(40, seed=7)["pixel_values"])
    model.set_corpus(RetrievalCorpus.from_store(rows, clip=tiny_clip))
    return model


def test_vs2pp_leaves_out_the_image_itself(searching):
    """Evaluating on images of the corpus: each would be its own nearest neighbour and bring its own label."""
    rows, classes = searching.corpus.rows[:5], torch.eye(24)[:3]
    with torch.no_grad():
        with_itself = searching.steer_cls(rows, class_embeds=classes).rows
        without = searching.steer_cls(rows, class_embeds=classes, exclude=torch.arange(5)).rows
        smaller = VS2CLIPForZeroShot(searching.clip, searching.sae, lambda_=0.7, method="vs2++", num_neighbors=6)
        for row in range(5):
            others = torch.cat([searching.corpus.rows[:row], searching.corpus.rows[row + 1 :]])
            smaller.set_corpus(RetrievalCorpus(others))
            expected = smaller.steer_cls(rows[row : row + 1], class_embeds=classes).rows[0]
            torch.testing.assert_close(without[row], expected)
    assert not torch.equal(with_itself, without)


def test_vs2pp_says_what_it_lacks(searching, tiny_clip, sae):
    """A corpus, classes, enough rows, one SAE on the last layer: each is named where it is missing."""
    pixels = make_inputs()["pixel_values"]
    with pytest.raises(ValueError, match=r"needs to know the classes: give class_embeds="):
        searching.image_features(pixels)
    with pytest.raises(ValueError, match=r"class_embeds must be \(num_classes, 24\), not \(3, 5\)"):
        searching.image_features(pixels, class_embeds=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"41 neighbours were asked for; the corpus of 40 rows"):
        searching.set_steering(num_neighbors=41)
        searching(**make_inputs())
    searching.set_corpus(None)
    with pytest.raises(ValueError, match=r"method='vs2\+\+' needs a corpus.*set_corpus"):
        searching(**make_inputs())
    inner = VS2CLIPForZeroShot(tiny_clip, {1: fitted_sae(tiny_clip, layer=1), LAST: sae})
    with pytest.raises(
        ValueError, match=r"steers the last layer alone \(2\); this model holds SAEs for layers \[1, 2\]"
    ):
        inner.set_steering(method="vs2++")
    for settings, message in (
        ({"positives": "nearest"}, "use one of majority, query"),
        ({"num_neighbors": 0}, "num_neighbors must be a whole number from 1"),
    ):
        with pytest.raises(ValueError, match=message):
            searching.set_steering(**settings)


@pytest.mark.slow
def test_vs2pp_compiled_and_trained(searching):
    """What people do with any model: neither may lose the corpus or the gradient."""
    inputs = make_inputs()
    with torch.no_grad():
        expected = searching(**inputs).logits_per_image
        compiled = torch.compile(searching, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits_per_image, expected)
    searching(**inputs).logits_per_image.sum().backward()
    for weight in (searching.clip.vision_model.embeddings.class_embedding, searching.sae.W_dec):
        assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


# Settings


def test_settings_change_one_at_a_time(model, sae):
    """A sweep sets one thing and expects the rest to stay; a gate given one way replaces the other way."""
    assert model.steering_settings == model.config.steering()
    model.set_steering(gamma=2.0)
    model.set_steering(gate=0.9)
    assert (model.config.gamma, model.config.lambda_, model.config.gate) == (2.0, 2.1, 0.9)
    assert model.fvu_thresholds == {LAST: sae.fvu_threshold(0.9)}
    model.set_steering(fvu_threshold=0.5)
    assert (model.config.gate, model.config.fvu_threshold) == (None, 0.5) and model.fvu_thresholds == {LAST: 0.5}
    model.set_steering(gate=0.5)
    assert (model.config.gate, model.config.fvu_threshold) == (0.5, None)
    model.set_steering(gate=None)
    assert model.fvu_thresholds == {LAST: None}


def test_what_is_saved_is_the_steering_in_force(model, tmp_path):
    """A setting written into the config steers nothing: saved, it would be another model than the one measured."""
    model.config.gamma = 3.0
    model.save_pretrained(tmp_path, full=True)
    assert VS2CLIPForZeroShot.from_pretrained(tmp_path).steering_settings.gamma == 1.5


def test_overrides_are_nested_and_survive_exceptions(model):
    """An exception inside the block (an out-of-memory batch, Ctrl-C) must not leave the model unsteered for ever."""
    inputs = make_inputs()
    with torch.no_grad():
        before = model(**inputs).logits_per_image
        with model.steering(method="centroid", gate=0.9) as same:
            assert same is model
            with model.steering(enabled=False):
                assert not model(**inputs).steered.any()
            assert (model.steering_settings.method, model.steering_settings.gate) == ("centroid", 0.9)
        with pytest.raises(RuntimeError, match="out of memory"), model.steering(gamma=3.0):
            raise RuntimeError("out of memory")
        assert torch.equal(model(**inputs).logits_per_image, before)
        with model.editing():  # none
            assert torch.equal(model(**inputs).logits_per_image, before)
        with model.editing(set={3: 40.0}):
            assert not torch.equal(model(**inputs).logits_per_image, before)
            with model.editing(suppress=[5]):  # in place of the others
                assert model.steering_settings.edits == LatentEdits(suppress=[5])
        assert torch.equal(model(**inputs).logits_per_image, before) and "edits" not in model.config.to_dict()
    assert model.config.method == "vs2" and model.config.gamma == 1.5, "an override is not for save_pretrained"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gama": 2.0}, TypeError, "gama"),
        ({"method": "vs3"}, ValueError, "method='vs3'"),
        ({"lambda_": "2"}, ValueError, "lambda_"),
        ({"gamma": [1.0, 2.0]}, ValueError, "gamma holds 2 factors, but the SAE of layer 2 has 128 latents"),
        ({"gate": 0.9999}, ValueError, "gate=0.9999 lies outside the calibrated quantiles"),
        ({"gate": 0.9, "fvu_threshold": 0.1}, ValueError, "exclude each other"),
        ({"method": "centroid", "gamma": [1.5] * LATENTS}, ValueError, "gamma must be one number"),
        ({"gamma": []}, ValueError, "gamma must be a finite number, or one a latent"),
        ({"edits": {"suppress": [LATENTS]}}, ValueError, f"edits names the latent {LATENTS}; the SAE has {LATENTS}"),
        ({"edits": {"suppress": [-1]}}, ValueError, "counted from 0"),
        ({"edits": {"suppress": "17"}}, ValueError, "suppress must be a list of latents"),
        ({"edits": {"suppress": 17}}, ValueError, "suppress must be a list of latents"),
        ({"edits": {"amplify": [17]}}, ValueError, "amplify must map latents to numbers"),
        ({"edits": {"amplify": {3: float("nan")}}}, ValueError, "amplify of latent 3 must be a finite number"),
        ({"edits": {"amplify": {3: 2.0}, "suppress": [3]}}, ValueError, "Latent 3 has two edits"),
        ({"edits": {"set": {1.5: 2.0}}}, ValueError, "set names the latent 1.5"),
        ({"edits": {"silence": [4]}}, ValueError, "edits has 'silence'"),
        ({"edits": [4]}, ValueError, "edits must be LatentEdits or a dict"),
    ],
)
def test_refused_settings_leave_the_model_as_it_was(model, settings, error, message):
    """A typo in a notebook must not half-apply; an edit that was ignored would look like a latent without effect."""
    inputs, before, config = make_inputs(), model.steering_settings, model.config.to_dict()
    with torch.no_grad():
        logits = model(**inputs).logits_per_image
        for change in (model.set_steering, lambda **settings: model.steering(**settings).__enter__()):
            with pytest.raises(error, match=message):
                change(**settings)
        assert model.steering_settings == before and model.config.to_dict() == config
        assert torch.equal(model(**inputs).logits_per_image, logits)


def test_a_gate_needs_a_calibrated_sae(tiny_clip):
    """A gate that silently lets everything through is worse than an error."""
    with pytest.raises(ValueError, match="holds no FVU quantiles.*Calibrate it"):
        VS2CLIPForZeroShot(tiny_clip, make_sae(HIDDEN), gate=0.99)


# Mistakes


def test_unusable_arguments_are_named(tiny_clip, sae):
    """Each with the argument and what was expected."""
    inputs = make_inputs()
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="You have to specify pixel_values"):  # as CLIPModel says it
        VS2CLIPForZeroShot(tiny_clip, sae)(**inputs)
    with pytest.raises(TypeError, match="clip must be a transformers CLIPModel, not CLIPVisionModel"):
        VS2CLIPForZeroShot(tiny_clip.vision_model, sae)
    for nothing in (None, {}, {LAST: "sae"}):
        with pytest.raises(TypeError, match="sae must be an SAEModel, or a dict of layer index -> SAEModel"):
            VS2CLIPForZeroShot(tiny_clip, nothing)
    with pytest.raises(ValueError, match="layer=3 does not exist: the vision tower has 3 layers, 0 to 2"):
        VS2CLIPForZeroShot(tiny_clip, {3: sae})
    with pytest.raises(ValueError, match="Two SAEs for layer 2"):
        VS2CLIPForZeroShot(tiny_clip, {2: sae, -1: sae})
    with pytest.raises(ValueError, match="SAE given for layer 2 was trained on layer 1"):
        VS2CLIPForZeroShot(tiny_clip, {2: fitted_sae(layer=1)})
    two = VS2CLIPForZeroShot(tiny_clip, {0: fitted_sae(tiny_clip, 0), LAST: fitted_sae(tiny_clip, LAST)})
    with pytest.raises(ValueError, match="edits name latents of one SAE"):  # of which of the two?
        two.set_steering(edits={"suppress": [4]})
    model = VS2CLIPForZeroShot(tiny_clip, sae)
    for given in ({"gamma": 3.0}, {"gama": 3.0}, {"sae": sae}):
        with pytest.raises(TypeError, match=f"from the config alone, not {next(iter(given))}"):
            VS2CLIPForZeroShot(model.config, **given)
    with pytest.raises(ValueError, match=r"CLS rows of this CLIP are \(batch, 32\); these are \(4, 24\)"):
        model.image_features_from_cls(torch.zeros(4, 24))
    with pytest.raises(ValueError, match=r"No SAE for layer 0: this model holds SAEs for layers \[2\]"):
        model.steer_cls(torch.zeros(4, HIDDEN), layer=0)


# CLIP's interface


def test_return_loss_and_tuples_as_clip_gives_them(model, tiny_clip):
    """Code written for CLIPModel (a training loop, a pipeline) must run with the wrapper in its place."""
    inputs = make_inputs(batch=3, texts=3)
    with torch.no_grad():
        out = model(**inputs, return_loss=True)
        target = torch.arange(3)
        expected = torch.nn.functional.cross_entropy(out.logits_per_text, target)
        expected = (expected + torch.nn.functional.cross_entropy(out.logits_per_image, target)) / 2
        torch.testing.assert_close(out.loss, expected)
        with model.steering(enabled=False):
            assert torch.equal(model(**inputs, return_loss=True).loss, tiny_clip(**inputs, return_loss=True).loss)
            plain_tuple = model(**inputs, return_dict=False)
        as_tuple = model(**inputs, return_dict=False)
        assert model(**inputs).loss is None
    assert isinstance(as_tuple, tuple) and isinstance(plain_tuple, tuple)
    assert torch.equal(as_tuple[0], out.logits_per_image) and torch.equal(as_tuple[2], out.text_embeds)
    clip_tuple = tiny_clip(**inputs, return_dict=False)
    assert torch.equal(plain_tuple[0], clip_tuple[0]) and len(plain_tuple) == len(clip_tuple) + 1


def test_text_features_are_untouched(model, tiny_clip):
    """Class embeddings made with either model are interchangeable."""
    inputs = make_inputs()
    del inputs["pixel_values"]
    with torch.no_grad():
        assert_same_output(model.get_text_features(**inputs), tiny_clip.get_text_features(**inputs))


@pytest.mark.parametrize("layers", [(LAST,), (1, LAST)])
def test_larger_images_by_interpolated_positions(tiny_clip, layers):
    """CLIP's own option for images of another size must reach the embeddings on both paths."""
    model = VS2CLIPForZeroShot(tiny_clip, {layer: fitted_sae(layer=layer) for layer in layers})
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        features = model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
        assert features.shape == (2, 24) and features.isfinite().all()
        with model.steering(fvu_threshold=0.0):
            plain = tiny_clip.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output
            assert torch.equal(model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output, plain)


# Attention, precision, copies, training


def test_float32_sae_steers_a_bfloat16_clip(tiny_clip, sae):
    """The usual mix: a CLIP loaded in bfloat16 and an SAE as it was trained."""
    inputs = make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    model = VS2CLIPForZeroShot(tiny_clip.bfloat16(), sae)
    with torch.no_grad():
        assert model(**inputs).logits_per_image.dtype == torch.bfloat16
        rows = cls_rows(tiny_clip, inputs["pixel_values"])
        found = model.steer_cls(rows)
        # Computed in float32 and rounded once: the norm is kept to bfloat16's own precision.
        torch.testing.assert_close(found.rows.float().norm(dim=-1), rows.float().norm(dim=-1), rtol=2**-8, atol=0)
        torch.testing.assert_close(found.fvu, sae(rows.float()).fvu)


@pytest.mark.parametrize("layers", [(LAST,), (1,), (0, LAST)])
def test_training_the_clip_through_the_steering(tiny_clip, layers):
    """Fine-tuning under steering: every vision weight gets its gradient, the same with gradient checkpointing."""
    model = VS2CLIPForZeroShot(tiny_clip, {layer: fitted_sae(layer=layer) for layer in layers}, gate=0.9)
    model.train()
    inputs = make_inputs(batch=3, texts=3)

    def gradients():
        model.zero_grad()
        model(**inputs, return_loss=True).loss.backward()
        return {name: p.grad.clone() for name, p in model.clip.named_parameters() if p.grad is not None}

    expected = gradients()
    assert expected.keys() == dict(model.clip.named_parameters()).keys()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    assert tiny_clip.vision_model.encoder.layers[0].gradient_checkpointing
    found = gradients()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


# torch.compile


def compiled_equals_eager(clip, backend, layers):
    torch.compiler.reset()
    model = VS2CLIPForZeroShot(clip, {layer: fitted_sae(clip, layer=layer) for layer in layers}, gate=0.9)
    inputs = make_inputs()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for settings in ({}, {"lambda_": 0.5}, {"enabled": False}, {}):
            with model.steering(**settings):
                expected, found = model(**inputs), compiled(**inputs)
            torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=1e-4, atol=1e-4)
            assert torch.equal(found.steered, expected.steered), "the compiled model must follow a change of settings"


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(LAST,), (0, LAST)])
def test_compiles_whole_and_follows_the_settings(tiny_clip, layers):
    """A graph break costs the speed it was compiled for; a stale graph would go on steering after it is switched off."""
    compiled_equals_eager(tiny_clip, "eager", layers)


@pytest.mark.slow
def test_inductor_compiles_it(tiny_clip):
    """The backend that people use; it needs a C++ compiler."""
    compiled_equals_eager(tiny_clip, "inductor", (LAST,))
