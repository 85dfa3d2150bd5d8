"""Every way in which a file of a checkpoint has been seen to be wrong: each is refused in one message that names the place and
the fault, before it becomes NaN scores, or an error in the middle of a run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import ARTEFACTS, bounded_memory
from harms import Harm, at, config, tensor, tensors, without
from safetensors.torch import load_file, save_file
from toy import forget_digests, make_rows, make_sae

from hf_vs2 import RetrievalCorpus, VS2CLIPForZeroShot, measure_statistics
from hf_vs2.files.checkpoint_folder import CheckpointFolder


Harms = dict[str, tuple[Harm, str]]
STATISTICS, LABEL_SETS = "statistics.safetensors", "label_sets.safetensors"


def header(change: Callable[[dict[str, Any]], Any]) -> Harm:
    def harm(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:end])
        change(entries)
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return harm


def text(content: str | bytes, name: str = "config.json") -> Harm:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def other_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(__file__)


def no_header(name: str) -> Harm:
    return lambda folder: save_file(load_file(folder / name), folder / name)


NAN, INF, HUGE = float("nan"), float("inf"), 10**12
SAE: Harms = {
    "field missing": (config(top_k=...), r"config.json of .*field 'top_k' is missing"),
    "text for a number": (config(gamma="1.5"), r"config.json of .*gamma"),
    "number no float holds": (config(gamma=10**400), r"config.json of .*gamma=1000"),
    "NaN": (config(lambda_=NAN), r"config.json of .*lambda_=nan"),
    "more active than there are": (config(top_k=10_000), r"config.json of .*top_k=10000"),
    "width to fill any memory": (config(hidden_size=HUGE), r"model.safetensors: W_enc is \(128, 32\), by config.json"),
    "latents to fill any memory": (config(num_latents=HUGE, hidden_size=HUGE), r"model.safetensors: W_enc is"),
    "quantile NaN": (config(fvu_quantiles={"0.5": NAN}), r"config.json of .*fvu_quantiles"),
    "quantile negative": (config(fvu_quantiles={"0.5": -0.1}), r"config.json of .*fvu_quantiles"),
    "quantiles fall": (config(fvu_quantiles={"0.5": 0.9, "0.9": 0.5}), r"fvu_quantiles.*must rise"),
    "quantile of no level": (config(fvu_quantiles={"half": 0.5}), r"config.json of .*fvu_quantiles"),
    "quantiles a list": (config(fvu_quantiles=[0.5]), r"config.json of .*fvu_quantiles"),
    "variance negative": (config(total_variance=-1.0), r"config.json of .*total_variance=-1"),
    "fingerprint NaN": (config(base_model_fingerprint=[NAN]), r"config.json of .*base_model_fingerprint"),
    "layer beyond the tower": (config(base_model_num_layers=2), r"config.json of .*layer=2 does not exist"),
    "version of the future": (config(format_version=2), r"config.json of .*format version 2.*Install a newer hf_vs2"),
    "version that never was": (config(format_version=0), r"config.json of .*format_version=0"),
    "another library's": (config(model_type="bert"), r"config.json of .*'bert' model"),
    "dtype of no weights": (config(dtype="int8"), r"config.json of .*dtype='int8'"),
    "dtype that is no dtype": (config(dtype="os.system"), r"config.json of .*dtype='os.system'"),
    "quantised": (config(quantization_config={"quant_method": "x"}), r"'quantization_config'.*not loaded"),
    "weights elsewhere": (config(transformers_weights="../x.safetensors"), r"'transformers_weights'.*not loaded"),
    "kernel from a repository": (config(attn_implementation="x/y"), r"'attn_implementation'.*not loaded"),
    "field that is a method": (config(to_dict=5), r"config.json of .*'to_dict' would replace"),
    "no JSON": (text("{"), r"config.json"),
    "JSON, but a list": (text("[1]"), r"config.json of"),
    "JSON, but null": (text("null"), r"config.json of"),
    "no text": (text(b"\xff\xfe\0"), r"config.json"),
    "a million brackets": (text("[" * 1_000_000), r"config.json of"),
    "a number of 5000 digits": (text('{"hidden_size": ' + "9" * 5000 + "}"), r"config.json of"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config.json"),
    "weight NaN": (tensor("W_enc", at(3, NAN)), r"model.safetensors is damaged: W_enc holds NaN"),
    "weight infinite": (tensor("b_pre", at(3, INF)), r"model.safetensors is damaged: b_pre holds .* inf"),
    "exponent flipped": (tensor("W_dec", at(3, 1e37)), r"model.safetensors is damaged: W_dec holds .*1e\+37"),
    "mean NaN": (tensor("mean", at(3, NAN)), r"model.safetensors is damaged: mean holds NaN"),
    "tensor missing": (without("mean"), r"safetensors lacks mean"),
    "tensor too many": (tensors(lambda all: all | {"gate": torch.ones(3)}), r"model.safetensors holds gate"),
    "tensor of other shape": (tensor("W_dec", lambda t: t.T), r"model.safetensors: W_dec is \(32, 128\), by config"),
    "tensor of int8": (tensor("W_dec", lambda t: t.to(torch.int8)), r"model.safetensors: W_dec is of type I8"),
    "tensor of bool": (tensor("mean", lambda t: t > 0), r"model.safetensors: mean is of type BOOL"),
    "tensor renamed": (header(lambda all: all.update(W_dex=all.pop("W_dec"))), r"model.safetensors lacks W_dec"),
    "size that no disk has": (header(lambda all: all["W_dec"].update(shape=[HUGE, 32])), r"safetensors is damaged"),
    "beyond the file": (header(lambda all: all["W_dec"].update(data_offsets=[0, HUGE])), r"safetensors is damaged"),
    "tensors that overlap": (
        header(lambda all: all["W_dec"].update(data_offsets=all["W_enc"]["data_offsets"])),
        r"model.safetensors is damaged",
    ),
    "header longer than the file": (text((1 << 60).to_bytes(8, "little"), "model.safetensors"), r"is damaged"),
    "cut to nothing": (text("", "model.safetensors"), r"model.safetensors is damaged"),
    "another file's link": (other_file, r"model.safetensors is damaged"),
}


FULL: Harms = {
    "layers without end": (
        config("clip_config", "vision_config", num_hidden_layers=10**5),
        r"has 100000 layers; it holds fewer tensors",
    ),
    "width to fill any memory": (config("clip_config", "text_config", hidden_size=10**5), r"model.safetensors"),
    "patches of no size": (config("clip_config", "vision_config", patch_size=0), r"model.safetensors|config.json"),
    "activation of no name": (
        config("clip_config", "text_config", hidden_act="nothing"),
        r"model.safetensors|config.json",
    ),
    "kernel from a repository": (
        config("clip_config", "vision_config", attn_implementation="x/y"),
        r"config.json of .*'attn_implementation'",
    ),
    "NaN in the CLIP": (
        tensor("clip.visual_projection.weight", at(3, NAN)),
        r"model.safetensors is damaged: clip.visual_projection.weight holds NaN",
    ),
    "CLIP without a tensor": (without("clip.logit_scale"), r"model.safetensors lacks clip.logit_scale"),
}
LIGHT: Harms = {
    "NaN in the CLIP it names": (
        lambda folder: tensor("visual_projection.weight", at(3, NAN))(folder.parent / "clip"),
        r"clip is damaged: visual_projection.weight holds NaN",
    ),
    "named CLIP without a tensor": (
        lambda folder: tensors(lambda all: {n: t for n, t in all.items() if n != "logit_scale"})(
            folder.parent / "clip"
        ),
        r"clip is damaged: it has no logit_scale",
    ),
    "no SAE": (config(sae_configs=[]), r"config.json beside .*names layers \[\]"),
    "SAEs a number": (config(sae_configs=3), r"config.json of .*sae_configs must be a list"),
    "an SAE a number": (config(sae_configs=[3]), r"config.json of .*sae_configs\[0\]"),
    "method of no name": (config(method="vs3"), r"config.json of .*method='vs3'"),
    "gamma NaN": (config(gamma=[NAN]), r"config.json of .*gamma"),
    "weights of two SAEs": (
        tensors(lambda all: all | {n.replace("saes.2", "saes.1"): t.clone() for n, t in all.items()}),
        r"model.safetensors holds saes.1",
    ),
}


def about_statistics(**about: Any) -> Harm:
    return tensors(name=STATISTICS, **about)


def statistic(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Harm:
    return tensor(key, change, STATISTICS)


def statistics_of_another_sae(folder: Path) -> None:
    measure_statistics(make_sae(24), make_rows(9, 24)).save(folder)


STATISTICS_HARMS: Harms = {
    "no header": (no_header(STATISTICS), "is not what this version"),
    "another format": (about_statistics(format="hf_vs2.corpus"), "format 'hf_vs2.corpus'"),
    "of the future": (about_statistics(format_version=2), "version 2.*Calibrate the checkpoint again"),
    "no count": (about_statistics(num_rows=...), "num_rows"),
    "endless count": (about_statistics(num_rows=INF), "is not what this version"),
    "quantiles in a list": (about_statistics(distance_quantiles=[1.0]), "is not what this version"),
    "text for a quantile": (about_statistics(distance_quantiles={"0.9": "far"}), "is not what this version"),
    "text for a level": (about_statistics(distance_quantiles={"most": 1.0}), "is not what this version"),
    "NaN for a quantile": (about_statistics(distance_quantiles={"0.9": NAN}), "is not what this version"),
    "number no float holds": (about_statistics(distance_quantiles={"0.9": 10**400}), "is not what this version"),
    "falling quantiles": (about_statistics(distance_quantiles={"0.5": 2.0, "0.9": 1.0}), "is not what this version"),
    "a tensor less": (without("variances", STATISTICS), "variances"),
    "a tensor more": (tensors(lambda found: found | {"label": torch.ones(2)}, STATISTICS), "label"),
    "NaN": (statistic("mean", at(0, NAN)), "mean holds NaN"),
    "NaN in a row": (statistic("rows", at(0, NAN)), "rows holds NaN"),
    "huge": (statistic("components", at(0, 1e30)), "components holds numbers from"),
    "negative variance": (statistic("variances", at(0, -1.0)), "variances"),
    "latent always off": (statistic("latent_frequency", at(0, 0.0)), "latent_frequency"),
    "latent more than always on": (statistic("latent_frequency", at(0, 1.5)), "latent_frequency"),
    "whole numbers": (statistic("mean", lambda found: found.long()), "mean"),
    "another width": (statistic("mean", lambda found: found[:8]), "components of statistics of width 8"),
    "half the components": (statistic("components", lambda found: found[:8]), "components of statistics of width 32"),
    "rows of another width": (statistic("rows", lambda found: found[:, :8]), "rows of statistics of width 32"),
    "a flat sketch": (statistic("rows", lambda found: found.flatten()), "rows of statistics of width 32"),
    "no rows at all": (statistic("rows", lambda found: found[:0]), "rows of statistics"),
    "a number for the mean": (statistic("mean", lambda found: found[0]), "is not what this version"),
    "of another SAE": (
        statistics_of_another_sae,
        "statistics of rows of width 24 and 96 latents; the SAE has 32 and 128",
    ),
}


def label_set(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Harm:
    return tensor(f"0.{key}", change, LABEL_SETS)


def listed(**changes: Any) -> Harm:
    known = {"method": FITTED, "settings": [], "labels": ["one", "two"]}
    return tensors(name=LABEL_SETS, label_sets=[known | changes])


def in_force(method: str, *others: Harm) -> Harm:
    """The method in force is another, and the others are done."""

    def harm(folder: Path) -> None:
        for one in (config(method=method), *others):
            one(folder)

    return harm


FITTED, OF_THE_CLIP = "prototypes+pca+sae", ("0.class_embeds", "0.prototypes", "0.mean")
FOR_THESE = "for these labels and this model it is"
LABEL_SET_HARMS: Harms = {
    "no header": (no_header(LABEL_SETS), "is not what this version"),
    "another file": (
        lambda folder: (folder / LABEL_SETS).write_bytes((folder / STATISTICS).read_bytes()),
        "hf_vs2.statistics",
    ),
    "of the future": (tensors(name=LABEL_SETS, format_version=2), "version 2.*Save the model again"),
    "no list": (tensors(name=LABEL_SETS, label_sets=None), "is not what this version"),
    "no labels": (listed(labels=None), "is not what this version"),
    "a label more": (listed(labels=["one", "two", "cat"]), FOR_THESE),
    "no known method": (listed(method="magic"), "magic"),
    "a method that fits nothing": (listed(method="vs2"), "vs2"),
    "fewer views": (listed(method="prototypes+pca"), "is not what this version"),
    "number no float holds": (listed(settings=[10**400]), "is not what this version"),
    "NaN": (label_set("prototypes", at(0, NAN)), "0.prototypes holds NaN"),
    "huge": (label_set("view_1", at(0, 1e30)), "0.view_1 holds numbers from"),
    "a tensor less": (without("0.weights", LABEL_SETS), "weights"),
    "a view less": (without("0.view_0", LABEL_SETS), "view_0"),
    "prototypes of fewer classes": (label_set("prototypes", lambda found: found[:1]), FOR_THESE),
    "another width": (label_set("mean", lambda found: found[:5]), FOR_THESE),
    "a list for the scale": (label_set("scale", lambda found: found.expand(4)), FOR_THESE),
    "flat views": (label_set("view_0", lambda found: found[:, 0]), "view_0 is"),
    "a view of another SAE": (label_set("view_1", lambda found: found[:, :50]), f"view_1 is .*, {FOR_THESE}"),
    "a view of another width": (label_set("view_0", lambda found: found[:, :20]), f"view_0 is .*, {FOR_THESE}"),
    "classes of another CLIP": (
        tensors(lambda found: found | {name: found[name][..., :7] for name in OF_THE_CLIP}, LABEL_SETS),
        rf"class_embeds is \(2, 7\), {FOR_THESE} \(2, ",
    ),
    "statistics missing": (
        in_force(FITTED, lambda folder: (folder / STATISTICS).unlink()),
        "needs statistics.*hf-vs2 calibrate",
    ),
    "statistics denied": (in_force(FITTED, config(holds_statistics=False)), "needs statistics.*hf-vs2 calibrate"),
    "statistics of another SAE": (statistics_of_another_sae, "width 24 and 96 latents; the SAE has"),
    "unknown method in force": (in_force("prototypes+magic"), "prototypes\\+magic"),
}


def of_other_rows(folder: Path) -> None:
    RetrievalCorpus(make_rows(7, 32)).save_pretrained(folder / "other")
    (folder / "other" / "corpus.safetensors").rename(folder / "corpus.safetensors")


def of_the_future(folder: Path) -> None:
    description = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(description | {"format_version": 2}))


CORPUS: Harms = {
    "other rows": (of_other_rows, "are not of one corpus"),
    "of the future": (of_the_future, "format version 2, this hf_vs2 reads version 1"),
    "another description": (text('{"a": 1}', "corpus.json"), "does not say format"),
}

HARMED = [
    ("SAE", "SAE", SAE),
    ("full", "full", FULL),
    ("light", "light", LIGHT),
    ("statistics", "SAE", STATISTICS_HARMS),
    ("label sets", "light", LABEL_SET_HARMS),
    ("corpus", "corpus", CORPUS),
]
"""What is damaged, the artefact that it is a part of, and how."""


@pytest.mark.parametrize(
    ("part", "kind", "harm", "message"),
    [
        pytest.param(part, kind, *harm, id=f"{part}: {name}")
        for part, kind, known in HARMED
        for name, harm in known.items()
    ],
)
def test_a_damaged_file_is_refused_in_one_message(copied, part, kind, harm, message):
    """transformers warns and fills in random numbers, or fails deep inside; a CLIP whose config asks for all the memory
    gets it."""
    folder = copied(kind)
    if part in ("statistics", "label sets"):
        forget_digests(folder)  # which would tell of any damage
    harm(folder)
    with bounded_memory(), pytest.raises((ValueError, OSError), match=message) as caught:
        ARTEFACTS[kind].read(folder)
    assert type(caught.value) in (ValueError, OSError)
    assert str(folder) in str(caught.value) or part in ("SAE", "full", "light", "corpus"), "names the place"


@pytest.mark.parametrize(("kind", "name"), [("SAE", STATISTICS), ("light", STATISTICS), ("light", LABEL_SETS)])
def test_a_folder_without_a_file_that_its_config_promises_is_not_pushed(copied, monkeypatch, kind, name):
    """It would be broken for whoever loads it from the Hub. Here VS2 does without statistics."""
    folder = copied(kind)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"should hold {name}"):
        CheckpointFolder.open(folder)
    if (kind, name) == ("light", STATISTICS):
        monkeypatch.chdir(folder.parent)
        assert VS2CLIPForZeroShot.from_pretrained(folder).domain_statistics is None
