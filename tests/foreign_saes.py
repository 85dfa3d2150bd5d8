"""SAEs in the files of other libraries, and what they compute by formula."""

import json

import torch
from safetensors.torch import save_file
from toy import clip_like_rows


WIDTH, LATENTS, K = 64, 192, 12


LENS = {
    "d_in": WIDTH,
    "d_sae": LATENTS,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.4.hook_resid_post"},
    "architecture": "topk",
    "k": K,
    "rescale_acts_by_decoder_norm": False,
}


SPARSIFY = {
    "activation": "topk",
    "expansion_factor": 32,
    "normalize_decoder": True,
    "num_latents": LATENTS,
    "k": K,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": WIDTH,
}


PRISMA = {
    "architecture": "standard",
    "d_in": WIDTH,
    "expansion_factor": LATENTS // WIDTH,
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": K},
    "normalize_activations": "none",
    "hook_point_layer": 4,
    "layer_subtype": "hook_resid_post",
    "hook_point_head_index": None,
    "is_transcoder": False,
    "cls_token_only": True,
    "_dtype": "float32",
}


LIBRARIES = {
    "sparsify": ("cfg.json", "sae.safetensors", SPARSIFY),
    "sae_lens": ("cfg.json", "sae_weights.safetensors", LENS),
    "prisma": ("config.json", "weights.safetensors", PRISMA),
}


def weights(width=WIDTH, latents=LATENTS, seed=0, dtype=torch.float32):
    """Encoder and decoder rows of very different lengths, biases, and a centre as far off as CLIP's mean."""
    draw = torch.Generator().manual_seed(seed)
    length = 0.2 + 2 * torch.rand(latents, 1, generator=draw)
    found = {
        "W_enc": torch.randn(latents, width, generator=draw) / width**0.5,
        "b_enc": 0.3 * torch.randn(latents, generator=draw),
        "W_dec": length * torch.nn.functional.normalize(torch.randn(latents, width, generator=draw), dim=-1),
        "b_dec": clip_like_rows(64, width).mean(0),
    }
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def write(folder, library, settings=None, tensors=None):
    """A checkpoint in a library's layout, made without it."""
    config, file, default = LIBRARIES[library]
    tensors = weights() if tensors is None else tensors
    if library == "sparsify":
        names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
        tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    elif "W_enc" in tensors:
        tensors = tensors | {"W_enc": tensors["W_enc"].T.contiguous()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file)
    merged = {name: value for name, value in (default | (settings or {})).items() if value != "absent"}
    (folder / config).write_text(json.dumps(merged))
    return folder


def reference(x, tensors, k=K, absolute=False, center=True, rescale=False, factor=1.0):
    """Dense code and reconstruction by the published formulas, in float64; `k=None` is a plain ReLU."""
    parts = {name: tensor.double() for name, tensor in tensors.items()}
    x = x.double() * factor
    code = (x - parts["b_dec"] if center else x) @ parts["W_enc"].T + parts["b_enc"]
    norms = parts["W_dec"].norm(dim=-1) if rescale else torch.ones(len(parts["W_dec"])).double()
    code = code * norms
    strength = code.abs() if absolute else code
    if k is not None:
        threshold = strength.sort(dim=-1).values[:, -k, None]
        code = torch.where(strength >= threshold, code, 0)
    code = code if absolute else code.clamp(min=0)
    return code, ((code / norms) @ parts["W_dec"] + parts["b_dec"]) / factor


def dense(sae, x):
    """The code of each row with every latent in its place, and the reconstruction."""
    with torch.no_grad():
        values, indices = sae.encode(x)
        code = torch.zeros(len(x), sae.config.num_latents, dtype=values.dtype).scatter_(1, indices, values)
        return code, sae.decode(values, indices)


def assert_same(found, expected):
    """To 1e-5 of the largest number, code and reconstruction."""
    for one, other in zip(found, expected, strict=True):
        scale = other.abs().max()
        assert scale > 0
        assert (one.double() - other.double()).abs().max() < 1e-5 * scale
