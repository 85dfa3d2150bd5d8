"""SAEs of other libraries compute here what they computed there, and ours there what they compute here.

The formulas are restated in float64 below, so that no other library is needed. Where sparsify, SAELens or ViT-Prisma are installed,
their own code writes and reads the files (ViT-Prisma's package index has no release with SAEs: install it from its repository).
"""

import json
import pickle
import shutil

import pytest
import torch
from foreign_saes import LATENTS, LIBRARIES, WIDTH, K, assert_same, dense, reference, weights, write
from harms import Code
from hub_models import serve
from loopback_hub import File
from safetensors.torch import load_file
from toy import clip_like_rows, make_rows, make_sae
from trainings import make_trainer

from hf_vs2 import SAEModel, VS2CLIPForZeroShot, calibrate
from hf_vs2.data.stores.rows import rows_of
from hf_vs2.files.foreign import detect
from hf_vs2.training.calibration import activation_statistics


LOAD = {name: getattr(SAEModel, f"from_{name}") for name in LIBRARIES}


EXPRESSIBLE = {
    "sparsify": ("sparsify", {}, {}),
    "sparsify, old and sparse cfg": ("sparsify", {"multi_topk": "absent", "transcode": "absent", "k": 32}, {"k": 32}),
    "sparsify, signed": ("sparsify", {"signed": True}, {"absolute": True}),
    "sae_lens topk": ("sae_lens", {}, {}),
    "sae_lens, bias not subtracted": ("sae_lens", {"apply_b_dec_to_input": False}, {"center": False}),
    "sae_lens, rescaled": ("sae_lens", {"rescale_acts_by_decoder_norm": True}, {"rescale": True}),
    "sae_lens, both": (
        "sae_lens",
        {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False},
        {"rescale": True, "center": False},
    ),
    "sae_lens abstopk": ("sae_lens", {"architecture": "abstopk"}, {"absolute": True}),
    "sae_lens standard": ("sae_lens", {"architecture": "standard", "k": "absent"}, {"k": None}),
    "sae_lens before 6": (
        "sae_lens",
        {"architecture": "absent", "k": "absent", "metadata": "absent", "hook_name": "blocks.4.hook_resid_post"}
        | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}, "apply_b_dec_to_input": "absent"},
        {"k": 7},
    ),
    "prisma topk": ("prisma", {}, {}),
    "prisma relu": ("prisma", {"activation_fn_str": "relu", "activation_fn_kwargs": {}}, {"k": None}),
}


@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_a_converted_sae_computes_the_published_formulas(tmp_path, case):
    """A factor folded wrongly, or a bias forgotten, gives steering vectors that look right and are not."""
    library, settings, formula = EXPRESSIBLE[case]
    sae = LOAD[library](write(tmp_path, library, settings))
    x = clip_like_rows(200, WIDTH)
    assert_same(dense(sae, x), reference(x, weights(), **formula))
    assert sae.config.activation == ("absolute" if formula.get("absolute") else "relu")
    assert sae.config.top_k == (formula.get("k", K) or LATENTS)
    assert sae.config.layer == (None if library == "sparsify" else 4)
    assert not sae.training
    sae.save_pretrained(tmp_path / "ours")
    assert_same(dense(SAEModel.from_pretrained(tmp_path / "ours"), x), reference(x, weights(), **formula))


@pytest.mark.parametrize("library", ["sae_lens", "prisma"])
def test_the_constant_of_normalised_activations_is_folded_in(tmp_path, library):
    """Trained on rows multiplied by a constant that its files don't hold: refused without, exact with it, in one step or two."""
    settings = {"normalize_activations": "expected_average_only_in"}
    write(tmp_path, library, settings)
    with pytest.raises(
        ValueError, match=r"normalize_activations='expected_average_only_in'.*Give it as scaling_factor="
    ):
        LOAD[library](tmp_path)
    x = clip_like_rows(200, WIDTH)
    assert_same(dense(LOAD[library](tmp_path, scaling_factor=0.37), x), reference(x, weights(), factor=0.37))
    with pytest.raises(ValueError, match="scaling_factor=nan must be a positive number"):
        LOAD[library](tmp_path, scaling_factor=float("nan"))
    write(tmp_path, library)
    with pytest.raises(ValueError, match="says that activations are not normalised"):
        LOAD[library](tmp_path, scaling_factor=0.37)
    if library == "sae_lens":
        together = {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}
        write(tmp_path, library, settings | together)
        code, reconstruction = dense(LOAD[library](tmp_path, scaling_factor=0.37), x)
        expected, rebuilt = reference(x, weights(), factor=0.37, rescale=True, center=False)
        # As SAELens' own folding has it: the decoder, and so the code measured by its length, is divided by the constant.
        assert_same((code, reconstruction), (expected / 0.37, rebuilt))


INEXPRESSIBLE = {
    "sparsify groupmax": ("sparsify", {"activation": "groupmax"}, "activation='groupmax'"),
    "sparsify transcoder": ("sparsify", {"transcode": True}, "transcode=True"),
    "sparsify skip": ("sparsify", {"skip_connection": True}, "skip_connection=True"),
    "sae_lens jumprelu": ("sae_lens", {"architecture": "jumprelu"}, "architecture='jumprelu'.*threshold"),
    "sae_lens gated": ("sae_lens", {"architecture": "gated"}, "architecture='gated'.*weights of its own"),
    "sae_lens batchtopk": ("sae_lens", {"architecture": "batchtopk"}, "other rows of the batch"),
    "sae_lens unheard of": ("sae_lens", {"architecture": "new"}, "only topk, abstopk and standard"),
    "sae_lens layer norm": ("sae_lens", {"normalize_activations": "layer_norm"}, "its own deviation"),
    "sae_lens norm": ("sae_lens", {"normalize_activations": "constant_norm_rescale"}, "its own length"),
    "sae_lens heads": ("sae_lens", {"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
    "sae_lens tanh": (
        "sae_lens",
        {"architecture": "absent", "metadata": {}, "activation_fn": "tanh-relu"},
        "activation_fn='tanh-relu'",
    ),
    "sae_lens elsewhere": ("sae_lens", {"metadata": {"hook_name": "blocks.4.hook_mlp_out"}}, "blocks.4.hook_mlp_out"),
    "sae_lens first": (
        "sae_lens",
        {"metadata": {"hook_name": "blocks.0.hook_resid_pre"}},
        "output of an encoder layer",
    ),
    "prisma gated": ("prisma", {"architecture": "gated"}, "architecture='gated'"),
    "prisma transcoder": ("prisma", {"is_transcoder": True}, "is_transcoder=True"),
    "prisma tanh": ("prisma", {"activation_fn_str": "tanh-relu"}, "activation_fn_str='tanh-relu'"),
    "prisma post": ("prisma", {"activation_fn_kwargs": {"k": 3, "postact_fn": "x"}}, "activation_fn_kwargs"),
    "prisma layer norm": ("prisma", {"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
    "prisma elsewhere": ("prisma", {"layer_subtype": "ln2.hook_normalized"}, "ln2.hook_normalized"),
    "prisma head": ("prisma", {"hook_point_head_index": 3}, "hook_point_head_index=3"),
    # damaged
    "text for a number": ("sparsify", {"k": "64"}, "k is '64', expected a whole number"),
    "truth for a number": ("sparsify", {"k": True}, "k is True, expected a whole number"),
    "no width": ("sae_lens", {"d_in": "absent"}, "lacks 'd_in'"),
    "another width": (
        "sae_lens",
        {"d_in": WIDTH + 1},
        rf"W_enc is \({WIDTH}, {LATENTS}\).*\({WIDTH + 1}, {LATENTS}\)",
    ),
    "k of nothing": ("sparsify", {"k": LATENTS + 1}, f"top_k={LATENTS + 1} must be between"),
    "negative width": ("sparsify", {"d_in": -1}, "encoder.weight"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_has_no_exact_counterpart_is_refused_by_name(tmp_path, case):
    """An SAE that is converted nearly right steers nearly right, and nobody sees it. The message names file and setting."""
    library, settings, expected = INEXPRESSIBLE[case]
    write(tmp_path, library, settings)
    with pytest.raises(ValueError, match=f"(?s){expected}") as refused:
        LOAD[library](tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("library", LIBRARIES)
def test_files_that_do_not_hold_what_they_say_are_refused(tmp_path, library):
    """Tensors that are not understood may change the result; NaN would; a file that is cut off can't be told from a short one."""
    config, file, _ = LIBRARIES[library]
    write(tmp_path, library, tensors=weights() | {"threshold": torch.ones(LATENTS)})
    with pytest.raises(ValueError, match=f"{file} holds threshold, which has no place in a top-k SAE"):
        LOAD[library](tmp_path)
    write(tmp_path, library, tensors={name: tensor for name, tensor in weights().items() if name != "b_enc"})
    with pytest.raises(ValueError, match=f"{file} lacks (b_enc|encoder.bias)"):
        LOAD[library](tmp_path)
    broken = weights()
    broken["W_dec"][3, 5] = torch.nan
    write(tmp_path, library, tensors=broken)
    with pytest.raises(ValueError, match=f"{file} is damaged: W_dec holds NaN"):
        LOAD[library](tmp_path)
    write(tmp_path, library, tensors={name: tensor.round().to(torch.int8) for name, tensor in weights().items()})
    with pytest.raises(ValueError, match="weights are floats of 16, 32 or 64 bits"):
        LOAD[library](tmp_path)
    write(tmp_path, library)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        LOAD[library](tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(OSError, match="has no .*a checkpoint of"):
        LOAD[library](tmp_path)
    write(tmp_path, library)
    (tmp_path / config).write_text("[1]")
    with pytest.raises(ValueError, match=f"{config} is no JSON object"):
        LOAD[library](tmp_path)
    with pytest.raises(TypeError, match="layers= is not known"):
        LOAD[library](tmp_path, layers=3)


def test_a_zero_decoder_row_is_refused_where_its_length_divides(tmp_path):
    """SAELens itself gives NaN for every row then."""
    tensors = weights()
    tensors["W_dec"][7] = 0
    write(tmp_path, "sae_lens", {"rescale_acts_by_decoder_norm": True}, tensors)
    with pytest.raises(ValueError, match="decoder row 7 is zero"):
        SAEModel.from_sae_lens(tmp_path)


def test_a_pickle_of_prisma_is_opened_only_where_it_holds_tensors_alone(tmp_path):
    """ViT-Prisma saves pickles. Plain tensors are read by torch's reader that runs nothing; the rest is refused, with a way out."""
    source, marker = write(tmp_path / "sae", "prisma"), tmp_path / "was here"
    x = clip_like_rows(100, WIDTH)
    tensors = load_file(source / "weights.safetensors")
    (source / "weights.safetensors").unlink()
    for content in (tensors, {"state_dict": tensors, "epoch": 3}):
        torch.save(content, source / "weights.pt")
        assert_same(dense(SAEModel.from_prisma(source), x), reference(x, weights()))
    for dump in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        dump({"cfg": Code(marker), "state_dict": tensors}, source / "weights.pt")
        with pytest.raises(ValueError, match=r"weights.pt is a pickle.*not opened.*save_file") as refused:
            SAEModel.from_prisma(source)
        assert not marker.exists()
    # What the message says to do, as somebody who trusts the file would.
    torch.save({"cfg": Code(marker), "state_dict": tensors}, source / "weights.pt")
    command = str(refused.value).split("is installed: ")[1].split(". Then")[0]
    names = {"torch": torch, "safetensors": __import__("safetensors.torch"), "path": source / "weights.pt"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(source)
        exec(command, names)
    assert marker.exists(), "the pickle does nothing: the test proves nothing"
    assert_same(dense(SAEModel.from_prisma(source), x), reference(x, weights()))
    shutil.copy(source / "weights.safetensors", source / "other.safetensors")
    with pytest.raises(ValueError, match="say which with weights_name="):
        SAEModel.from_prisma(source)
    assert SAEModel.from_prisma(source, weights_name="other.safetensors").config.top_k == K


def test_half_precision_becomes_float32_without_loss(tmp_path):
    """Folding in bfloat16 would lose what the library itself has; weights of float64 stay so."""
    tensors = weights(dtype=torch.bfloat16)
    write(tmp_path, "sae_lens", {"rescale_acts_by_decoder_norm": True, "dtype": "bfloat16"}, tensors)
    sae, x = SAEModel.from_sae_lens(tmp_path), clip_like_rows(200, WIDTH)
    assert sae.dtype == torch.float32
    assert_same(dense(sae, x), reference(x, tensors, rescale=True))
    assert SAEModel.from_sae_lens(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    write(tmp_path, "sparsify", tensors=weights(dtype=torch.float64))
    assert SAEModel.from_sparsify(tmp_path).dtype == torch.float64


def test_what_the_files_do_not_tell_is_asked_for(tmp_path, caplog):
    """Which CLIP, which layer, which mean: a default that nobody noticed would steer the wrong layer."""
    write(tmp_path / "layers.7", "sparsify")
    sae = SAEModel.from_sparsify(tmp_path / "layers.7")
    assert sae.config.layer == 7 and "give base_model_name_or_path=" in caplog.text
    assert "b_pre stands in for it until hf_vs2.calibrate" in caplog.text and "give layer=" not in caplog.text
    assert torch.equal(sae.mean, sae.b_pre)
    assert sae.config.training_data == {"converted_from": {"format": "sparsify", "name": "layers.7"}}
    with pytest.raises(ValueError, match="Calibrate it"):
        sae.fvu_threshold(0.99)

    caplog.clear()
    write(tmp_path / "best-of-5", "sparsify")
    options = {"base_model_name_or_path": "openai/clip-vit-base-patch32", "base_model_revision": "a" * 40}
    sae = SAEModel.from_sparsify(tmp_path / "best-of-5", **options)
    assert sae.config.layer is None and "taken for the last; give layer=" in caplog.text
    assert "base_model_name_or_path=" not in caplog.text
    assert sae.config.base_model_name_or_path == options["base_model_name_or_path"]

    caplog.clear()
    write(tmp_path / "lens", "sae_lens", {"metadata": {"hook_name": "blocks.4.hook_resid_pre"}})
    assert SAEModel.from_sae_lens(tmp_path / "lens").config.layer == 3
    write(tmp_path / "lens", "sae_lens", {"metadata": {"hook_name": "blocks.4.hook_mlp_out"}})
    assert SAEModel.from_sae_lens(tmp_path / "lens", layer=4).config.layer == 4
    write(tmp_path / "prisma", "prisma", {"cls_token_only": False})
    SAEModel.from_prisma(tmp_path / "prisma")
    assert "trained on CLS and patch tokens; here it reads the CLS token" in caplog.text


@pytest.mark.parametrize(
    "hook",
    [
        *("layers.7.mlp", "vision_model.encoder.layers.7.self_attn", "vision_model.encoder.layers.7.mlp.fc2", "h.7"),
        *(
            "text_model.encoder.layers.7",
            "vision_model.post_layernorm",
            "vision_model.embeddings",
            "visual_projection",
        ),
    ],
)
def test_an_sae_of_another_place_is_no_sae_of_the_last_layer(tmp_path, hook):
    """sparsify names a folder after the module whose output the SAE reads. One of an MLP was taken for the last
    layer's, and steered rows that it had never seen the like of."""
    write(tmp_path / hook, "sparsify")
    with pytest.raises(ValueError, match=f"the SAE reads '{hook}'.* Give layer="):
        SAEModel.from_sparsify(tmp_path / hook)
    assert SAEModel.from_sparsify(tmp_path / hook, layer=7).config.layer == 7


def test_calibration_gives_a_converted_sae_its_mean_and_its_gate(tmp_path, tiny_clip):
    """Without the training rows' mean the FVU, and so the gate, has no meaning. An SAE of our own keeps the mean it was trained with."""
    write(tmp_path / "theirs", "sparsify", {"d_in": 32}, weights(width=32))
    sae, rows = SAEModel.from_sparsify(tmp_path / "theirs"), make_rows(2000, 32)
    assert VS2CLIPForZeroShot(tiny_clip, sae).fvu_thresholds == {2: None}
    before = dense(sae, rows)
    metrics = calibrate(sae, rows)
    mean, variance = activation_statistics(rows_of(rows), torch.arange(2000))
    assert torch.allclose(sae.mean, mean) and sae.config.total_variance == pytest.approx(variance)
    assert sae.config.training_data["statistics_rows"] == 2000
    error = (rows - before[1]).double().square().sum() / (rows - rows.mean(0)).double().square().sum()
    assert metrics["fvu"] == pytest.approx(error.item(), rel=1e-5)
    assert_same(dense(sae, rows), before)
    sae.save_pretrained(tmp_path / "ours")
    again = SAEModel.from_pretrained(tmp_path / "ours")
    assert torch.equal(again.mean, sae.mean) and again.fvu_threshold(0.99) == sae.fvu_threshold(0.99)
    assert VS2CLIPForZeroShot(tiny_clip, again, gate=0.99).fvu_thresholds == {2: sae.fvu_threshold(0.99)}
    fresh = SAEModel.from_sparsify(tmp_path / "theirs")
    start = fresh.b_pre.detach().clone()
    trainer = make_trainer(tmp_path / "further", rows, model=fresh, max_steps=1, learning_rate=1e-9)
    trainer.train()
    assert torch.allclose(fresh.b_pre, start, atol=1e-6), "which belongs to its encoder"
    assert torch.allclose(fresh.mean, rows[trainer.train_indices].mean(0), atol=1e-5)
    assert "converted_from" in SAEModel.from_pretrained(tmp_path / "further").config.training_data, "labels unknown"
    own = make_sae(32)
    mean = own.mean.clone()
    calibrate(own, rows)
    assert torch.equal(own.mean, mean) and own.config.total_variance is None


def test_the_card_of_a_converted_sae_claims_nothing_of_its_training(tmp_path, tiny_clip):
    """Where it came from is said; that no labels were used is not, since nobody here knows."""
    sae = SAEModel.from_sparsify(write(tmp_path / "layers.3", "sparsify"))
    calibrate(sae, clip_like_rows(500, WIDTH))
    sae.save_pretrained(tmp_path / "ours")
    card = (tmp_path / "ours" / "README.md").read_text(encoding="utf-8")
    assert "| Converted from | `layers.3`, a checkpoint of sparsify |" in card
    assert "| Mean activation | of 500 images for calibration |" in card
    assert "o labels were used" not in card and "trained on, without labels" not in card and str(tmp_path) not in card
    own = make_sae(32)
    for one, known in (
        (SAEModel.from_sparsify(write(tmp_path / "layers.2", "sparsify", {"d_in": 32}, weights(width=32))), False),
        (own, True),
    ):
        VS2CLIPForZeroShot(tiny_clip, one).save_pretrained(tmp_path / "vs2", full=True)
        assert (" trained without labels" in (tmp_path / "vs2" / "README.md").read_text(encoding="utf-8")) is known
    own.save_pretrained(tmp_path / "own")
    assert "No labels were used" in (tmp_path / "own" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_checkpoint_on_the_hub_is_read_at_one_commit(hub, tmp_path, library):
    """The commit is recorded, weights and configuration are of the same one, and nothing else is downloaded."""
    config, file, _ = LIBRARIES[library]
    folder = write(tmp_path / "theirs", library)
    if library == "prisma":
        file = "weights.pt"
        torch.save(load_file(folder / "weights.safetensors"), folder / file)
    files = {f"layers.4/{name}": File((folder / name).read_bytes(), name == file) for name in (config, file)}
    files["layers.4/evil.py"] = File(b"raise SystemExit", False)
    serve(hub, f"ada/{library}", files)
    cache = tmp_path / "cache"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub.environment(cache).items():
            patch.setenv(name, value)
        place = {"subfolder": "layers.4", "cache_dir": cache}
        assert detect(f"ada/{library}", place) == library
        sae = LOAD[library](f"ada/{library}", **place)
        head = hub[f"ada/{library}"].head.sha
        expected = {"format": library, "name": f"ada/{library}", "revision": head, "subfolder": "layers.4"}
        assert sae.config.training_data == {"converted_from": expected}
        assert sae.config.layer == 4
        x = clip_like_rows(100, WIDTH)
        assert_same(dense(sae, x), reference(x, weights()))
        with pytest.raises(OSError, match=f"ada/{library}"):
            LOAD[library](f"ada/{library}", cache_dir=cache)
    assert not list(cache.rglob("evil.py"))


def test_detection_tells_the_formats_apart(tmp_path):
    """A wrong guess would read an SAE by the wrong formula; where two fit, the user has to say."""
    for library in LIBRARIES:
        assert detect(write(tmp_path / library, library), {}) == library
    make_sae().save_pretrained(tmp_path / "ours")
    assert detect(tmp_path / "ours", {}) == "hf_vs2"
    write(tmp_path / "prisma", "sparsify")
    with pytest.raises(ValueError, match="could be of sparsify and of prisma"):
        detect(tmp_path / "prisma", {})
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no format that is known here"):
        detect(tmp_path / "none", {})


@pytest.mark.parametrize("library", ["sparsify", "sae_lens"])
@pytest.mark.parametrize("top_k", [5, 64])
def test_what_is_saved_for_another_library_comes_back(tmp_path, library, top_k):
    """Out and in again: bit for bit the same weights, whatever they are."""
    sae, x = make_sae(top_k=top_k, num_latents=64, layer=3), make_rows(100)
    getattr(sae, f"save_{library}")(tmp_path / "layers.3")
    again = LOAD[library](tmp_path / "layers.3")
    for name in ("W_enc", "b_enc", "W_dec", "b_pre"):
        assert torch.equal(getattr(again, name), getattr(sae, name))
    assert (again.config.top_k, again.config.layer) == (top_k, 3)
    assert torch.equal(dense(again, x)[1], dense(sae, x)[1])


def test_absolute_goes_where_it_is_known(tmp_path):
    """sparsify's encoder ends in a ReLU: half of the code would be lost in silence. SAELens has it."""
    sae = make_sae(activation="absolute")
    with pytest.raises(ValueError, match="activation='absolute' can't be saved for sparsify"):
        sae.save_sparsify(tmp_path)
    assert not list(tmp_path.iterdir())
    sae.save_sae_lens(tmp_path)
    again = SAEModel.from_sae_lens(tmp_path)
    assert again.config.activation == "absolute" and torch.equal(
        dense(again, make_rows(50))[0], dense(sae, make_rows(50))[0]
    )


def test_no_path_of_this_machine_goes_out(tmp_path):
    """The folder of somebody's CLIP is nobody else's business; a Hub id is."""
    for base, expected in (
        (str(tmp_path / "clip"), None),
        ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch32"),
    ):
        make_sae(base_model_name_or_path=base).save_sae_lens(tmp_path)
        cfg = json.loads((tmp_path / "cfg.json").read_text())
        assert cfg["metadata"].get("model_name") == expected


# The libraries themselves

REAL_WIDTH, REAL_LATENTS, REAL_K = 768, 3072, 64


@pytest.fixture(scope="module")
def real_rows():
    return clip_like_rows(256, REAL_WIDTH, rank=64)


def fill(module, names):
    """Give a library's SAE realistic weights: its own initialisation has zero biases and unit decoder rows."""
    found = weights(REAL_WIDTH, REAL_LATENTS)
    with torch.no_grad():
        for theirs, ours in names.items():
            parameter = module.get_parameter(theirs)
            parameter.copy_(found[ours].T if parameter.shape != found[ours].shape else found[ours])


@torch.no_grad()
def test_sparsify_itself_agrees_both_ways(tmp_path, real_rows, monkeypatch):
    """What its own code writes and computes, and what it loads of ours."""
    monkeypatch.setenv(
        "SPARSIFY_DISABLE_TRITON", "1"
    )  # its Triton kernel does not run on a CPU, or only in the slow interpreter
    sparsify = pytest.importorskip("sparsify")
    cfg = sparsify.SparseCoderConfig(num_latents=REAL_LATENTS, k=REAL_K)
    theirs = sparsify.SparseCoder(REAL_WIDTH, cfg)
    fill(theirs, {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"})
    theirs.save_to_disk(tmp_path / "layers.11")
    sae = SAEModel.from_sparsify(tmp_path / "layers.11")
    assert sae.config.layer == 11

    def computed(coder):
        acts, indices, _ = coder.encode(real_rows)
        code = torch.zeros(len(real_rows), coder.num_latents).scatter_(1, indices, acts)
        return code, coder(real_rows).sae_out

    assert_same(dense(sae, real_rows), computed(theirs))
    sae.save_sparsify(tmp_path / "back")
    assert_same(computed(sparsify.SparseCoder.load_from_disk(tmp_path / "back")), dense(sae, real_rows))


LENS_KINDS = {
    "topk": {"k": REAL_K},
    "topk rescaled": {"k": REAL_K, "rescale_acts_by_decoder_norm": True},
    "topk uncentred": {"k": REAL_K, "apply_b_dec_to_input": False},
    "abstopk": {"k": REAL_K},
    "standard": {},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", LENS_KINDS)
def test_sae_lens_itself_agrees_both_ways(tmp_path, real_rows, kind):
    """As for sparsify; the constant of normalised activations by its own folding."""
    sae_lens = pytest.importorskip("sae_lens")
    options = {"d_in": REAL_WIDTH, "d_sae": REAL_LATENTS, "architecture": kind.split()[0], **LENS_KINDS[kind]}
    theirs = sae_lens.SAE.from_dict(options)
    fill(theirs, {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")})
    theirs.save_model(tmp_path / "theirs")
    sae = SAEModel.from_sae_lens(tmp_path / "theirs")

    def computed(other):
        return other.encode(real_rows), other(real_rows)

    assert_same(dense(sae, real_rows), computed(theirs))
    sae.save_sae_lens(tmp_path / "back")
    back = sae_lens.SAE.load_from_disk(tmp_path / "back")
    assert back.cfg.architecture() == kind.split()[0]
    assert_same(computed(back), dense(sae, real_rows))
    theirs.cfg.normalize_activations = "expected_average_only_in"
    theirs.save_model(tmp_path / "scaled")
    theirs.fold_activation_norm_scaling_factor(0.31)
    sae = SAEModel.from_sae_lens(tmp_path / "scaled", scaling_factor=0.31)
    assert_same(dense(sae, real_rows), computed(theirs))


@torch.no_grad()
@pytest.mark.parametrize(("activation", "options"), [("topk", {"k": REAL_K}), ("relu", {})])
def test_prisma_itself_agrees(tmp_path, real_rows, activation, options):
    """Its configuration file and its state dict. The pickle that its `save_model` writes is refused."""
    prisma = pytest.importorskip("vit_prisma.sae.sae")
    settings = {"activation_fn_str": activation, "activation_fn_kwargs": options, "normalize_activations": "none"}
    cfg = prisma.VisionModelSAERunnerConfig(
        d_in=REAL_WIDTH,
        expansion_factor=REAL_LATENTS // REAL_WIDTH,
        _device="cpu",
        layer_subtype="hook_resid_post",
        **settings,
    )
    theirs = prisma.StandardSparseAutoencoder(cfg)
    fill(theirs, {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")})
    cfg.save_config(str(tmp_path / "config.json"))
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    sae = SAEModel.from_prisma(tmp_path)
    assert sae.config.layer == 9
    _, code = theirs.encode(real_rows)
    assert_same(dense(sae, real_rows), (code, theirs.decode(code)))
    theirs.save_model(str(tmp_path / "weights.pt"))
    with pytest.raises(ValueError, match="is a pickle with more in it than tensors"):
        SAEModel.from_prisma(tmp_path)
