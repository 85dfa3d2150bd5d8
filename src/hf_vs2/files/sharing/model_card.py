"""Model cards, written from what a checkpoint and its result file record. The templates are in `model_cards/`."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from huggingface_hub import ModelCard, ModelCardData
from transformers.utils import logging

from ...config.latent_edits import LatentEdits
from ...config.sae import SAEConfig
from ...methods import METHODS
from ...version import INSTALLATION
from ..atomic import replace_text
from ..checkpoint_folder import CARD_NAME, VS2_TYPE, CheckpointFolder, looks_like_hub_id
from ..markdown import Markdown, code, escaped, number
from ..place import is_hub_id
from ..report import Results
from .card_edits import Card, CardError, license_of, refresh_card
from .card_results import ResultFacts, read_results


if TYPE_CHECKING:
    import jinja2

logger = logging.get_logger(__name__)

_STATISTICS = Markdown(
    "means and principal components of activations of unlabelled images, and, unless they were left out, activations "
    "of some thousand of them (`statistics.safetensors`)"
)
_ACTIVATIONS = {
    "relu": "ReLU, then the {} largest",
    "absolute": "the {} of largest absolute value, sign kept (eq. 1 as printed)",
}
_EXAMPLE_LABELS = ("a cat", "a dog", "a car")


def create_model_card(
    checkpoint: str | os.PathLike | CheckpointFolder,
    *,
    name: str | None = None,
    results: Results | ResultFacts | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """
    Write the card of a checkpoint.

    Args:
        checkpoint (path): an SAE checkpoint, a folder with several in subfolders, or a VS2 checkpoint.
        name (`str`, *optional*): the Hub id, or whatever readers shall put where the code says it; the folder's name
            by default.
        results ([`EvaluationResult`] or path, *optional*): the result file; by default `results.json` in the folder.
        license (`str`, *optional*): Hub identifier of the checkpoint's licence, such as `"apache-2.0"`.
        tags (`list[str]`, *optional*): further tags.

    Raises:
        `ValueError`: if the folder holds no checkpoint, or `results` were measured with another SAE. `OSError`: if a
            file is missing.
    """
    folder = checkpoint if isinstance(checkpoint, CheckpointFolder) else CheckpointFolder.open(checkpoint)
    name = name or folder.path.resolve().name
    saes = {place: SAEConfig(**config) for place, config in folder.sae_configs.items()}
    measured = read_results(folder, results)
    data = _metadata(folder, saes, measured, name.split("/")[-1], license, tags)
    is_vs2 = folder.model_type == VS2_TYPE
    text = (
        _environment()
        .get_template("vs2.md.jinja" if is_vs2 else "sae.md.jinja")
        .render(
            title=name.split("/")[-1],
            checkpoint=name,
            subfolder=list(saes)[-1] if folder.holds_several else "",
            several=len(saes) > 1,
            row="pooled" if any(config.site == "pooled" for config in saes.values()) else "CLS",
            base_model=_base_model(folder, saes),
            clip_on_hub=any(map(_base_id, _configs(folder))),
            hidden_size=next((config.hidden_size for config in saes.values()), 0),
            labels=_example_labels(measured),
            saes=[{"name": place, "facts": _sae_facts(folder, place, sae)} for place, sae in saes.items()],
            steering=_steering_facts(folder.configs[""]) if is_vs2 else [],
            used_labels=_used_labels(saes),
            holds_clip=is_vs2 and folder.configs[""].get("holds_clip", False),
            results=measured,
            licence=Markdown(f"This checkpoint is under {code(license)}.")
            if license
            else "Its authors have not stated a licence for this checkpoint.",
        )
    )
    text = re.sub(r"\n{3,}", "\n\n", text)  # left where the templates had nothing to say
    return ModelCard(Card.parse(f"---\n{data.to_yaml()}\n---\n\n{text}").signed("wrote").source)


def write_model_card(folder: str | os.PathLike, **options: Any) -> Path:
    """Write `README.md` into a checkpoint folder. A text that a user has written or edited stays; its metadata are
    brought up to date. `options` are those of [`create_model_card`]."""
    path = Path(folder) / CARD_NAME
    existing = read_card(path)
    try:
        options["license"] = options.get("license") or license_of(existing)
        content = refresh_card(str(create_model_card(folder, **options)), existing, str(path))
    except CardError as error:
        logger.warning(f"{error} The card was left as it is.")
        return path
    if content != existing:
        replace_text(path, content)
    return path


def read_card(path: Path) -> str | None:
    """The file with its line ends as they are; `None` where there is none."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8-sig", newline="") as file:
        return file.read()


@lru_cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_vs2", "model_cards"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # What templates and macros say themselves is Markdown; every value in them is escaped unless it is, too.
        autoescape=True,
        finalize=lambda value: value if hasattr(value, "__html__") else escaped(value),
    )
    # Not Jinja's own, which writes `'` for HTML pages.
    environment.filters["tojson"] = _python_literal
    environment.globals["installation"] = Markdown(INSTALLATION)
    environment.globals["clip_in_a_folder"] = Markdown(
        ' (the CLIP is not on the Hub: keep its folder where it was, or name it with `clip="FOLDER"`):'
    )
    return environment


def _python_literal(value: Any) -> Markdown:
    """For a line of code; a tag would be none there, but not everything that shows cards knows."""
    text = json.dumps(value, ensure_ascii=False)
    return Markdown(text.replace("<", "\\u003c").replace(">", "\\u003e"))


def _example_labels(results: ResultFacts | None) -> list[str]:
    """Three labels to show the code with: the first that were evaluated, where they are ordinary words."""
    names = results.class_names[:3] if results else []
    return names if names and all(re.fullmatch(r"[\w .,'()-]+", name) for name in names) else list(_EXAMPLE_LABELS)


# Metadata


def _metadata(
    folder: CheckpointFolder,
    saes: dict[str, SAEConfig],
    results: ResultFacts | None,
    title: str,
    license: str | None,
    tags: Sequence[str],
) -> ModelCardData:
    """What the Hub reads. A VS2 checkpoint counts as a transformers model, because only then does `pipeline(model=id)`
    find its task by itself; an SAE is used through hf_vs2."""
    is_vs2 = folder.model_type == VS2_TYPE
    bases = sorted({base for base in (_base_id(config) for config in _configs(folder)) if base})
    parts = [part for config in saes.values() for part in _parts(config.training_data or {})]
    data_sets = sorted({str(part.get("id")) for part in parts if looks_like_hub_id(part.get("id"))})
    return ModelCardData(
        license=license,
        library_name="transformers" if is_vs2 else "hf_vs2",
        pipeline_tag="zero-shot-image-classification" if is_vs2 else "feature-extraction",
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation="adapter" if bases else None,
        datasets=data_sets or None,
        metrics=["accuracy"] if results else None,
        tags=[
            "hf_vs2",
            "clip",
            "sparse-autoencoder",
            "visual-sparse-steering",
            *([tags] if isinstance(tags, str) else tags),
        ],
        model_name=title if results else None,
        eval_results=results.eval_results if results else None,
    )


def _configs(folder: CheckpointFolder) -> list[dict[str, Any]]:
    """The configurations that name the CLIP: the model's own, then its SAEs'."""
    return [*folder.configs.values(), *folder.sae_configs.values()]


def _base_id(config: dict[str, Any]) -> str | None:
    """Hub id of the CLIP. With a commit on record it was loaded from the Hub, whatever folders there are here."""
    name = config.get("base_model_name_or_path")
    is_id = is_hub_id(name) if config.get("base_model_revision") else looks_like_hub_id(name)
    return name if is_id else None


def _base_model(folder: CheckpointFolder, saes: dict[str, SAEConfig]) -> Markdown:
    for config in _configs(folder):
        name, revision = _base_id(config), config.get("base_model_revision")
        if name:
            return Markdown(f"{_link(name)} (revision {code(revision)})" if revision else _link(name))
    names = [config.base_model_name_or_path for config in saes.values() if config.base_model_name_or_path]
    if not names:
        return Markdown("a CLIP whose name was not recorded")
    return Markdown(f"a CLIP in a local folder ({code(Path(names[0]).name)})")


def _link(repository: str, kind: str = "") -> str:
    """To a repository of the Hub, whose id holds nothing that Markdown reads."""
    return f"[{repository}](https://huggingface.co/{kind}{repository})"


def _parts(data: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of the sets that were trained on, one after another as one."""
    return data.get("parts") or [data]


# Facts


_ROWS = {"cls": "CLS token at the output of", "pooled": "what the vision tower pools from"}
Facts: TypeAlias = list[tuple[str, str]]
"""What a fact is about, and what it is: words of anybody's, which the template escapes, or [`Markdown`]."""


def _sae_facts(folder: CheckpointFolder, place: str, config: SAEConfig) -> Facts:
    return [*_shape_facts(config), *_training_facts(config, folder.training_arguments(place)), *_quality_facts(config)]


def _shape_facts(config: SAEConfig) -> Facts:
    layers = config.base_model_num_layers
    layer = "the last encoder layer" if config.layer is None else f"encoder layer {config.layer}, counted from 0"
    if layers:
        layer += f", of {layers} layers"
    num_latents, width = config.weight_shape
    return [
        *([("CLIP family", code(config.base_model_type))] if config.base_model_type else []),
        ("Reads", f"{_ROWS[config.site]} {layer}"),
        ("Size", f"{width:,} inputs, {num_latents:,} features (expansion {num_latents / width:g})"),
        ("Active features", _ACTIVATIONS[config.activation].format(config.top_k)),
        ("Default steering", _default_steering(config)),
        *([("Statistics", _STATISTICS)] if config.holds_statistics else []),
    ]


def _default_steering(config: SAEConfig) -> str:
    rule = METHODS.get(config.method)
    if rule is not None and not (rule.acts and rule.reads_latents):
        has_gate = rule.acts and config.gate is not None
        return rule.label + (f", gate at its {config.gate:g} quantile of the distance" if has_gate else "")
    named = "" if config.method == "vs2" else f"{escaped(config.method)}, "
    steering = f"{named}gamma {_gamma(config.gamma)}, lambda {config.lambda_:g}"
    if config.gate is None or not config.fvu_quantiles:
        return f"{steering}, no gate"
    levels = [float(level) for level in config.fvu_quantiles]
    if not min(levels) <= config.gate <= max(levels):
        return f"{steering}, gate at quantile {config.gate:g}, for which it is not calibrated"
    tau = config.fvu_threshold(config.gate)
    held_out = f" of {config.num_calibration_rows:,} held-out images" if config.num_calibration_rows else ""
    return f"{steering}, gate at FVU {tau:.4g} (quantile {config.gate:g}{held_out})"


def _used_labels(saes: dict[str, SAEConfig]) -> bool | None:
    """Whether labels of the training images were used; `None` of SAEs that another library trained."""
    records = [config.training_data or {} for config in saes.values()]
    if any("label_loss" in record for record in records):
        return True
    return None if any("converted_from" in record for record in records) else False


def _describe_origin(origin: dict[str, Any]) -> Markdown:
    name, revision, subfolder = (origin.get(key) for key in ("name", "revision", "subfolder"))
    link = _link(str(name)) if revision and is_hub_id(name) else code(name)
    parts = [link, f"a checkpoint of {escaped(origin.get('format'))}"]
    parts += [f"folder {code(subfolder)}"] if subfolder else []
    parts += [f"revision {code(revision)}"] if revision else []
    return Markdown(", ".join(parts))


def _training_facts(config: SAEConfig, arguments: dict[str, Any]) -> Facts:
    data, metrics = config.training_data or {}, config.training_metrics or {}
    facts: Facts = []
    if data.get("converted_from"):
        facts.append(("Converted from", _describe_origin(data["converted_from"])))
        if data.get("statistics_rows"):
            facts.append(("Mean activation", f"of {number(data['statistics_rows'], ',')} images for calibration"))
    elif data:
        images = "; ".join(_describe_data(part) for part in _parts(data))
        selected = data.get("selected_from")
        images += f" (selected from {number(selected, ',')})" if selected else ""
        facts.append(("Training images", Markdown(images)))
    if data.get("label_loss"):
        facts.append(("Labels", _describe_label_loss(data["label_loss"])))
    fingerprints = [code(part["fingerprint"]) for part in _parts(data) if part.get("fingerprint")]
    if fingerprints:
        facts.append(("Fingerprint of the images", Markdown(", ".join(fingerprints))))
    if metrics.get("train_rows") is not None:
        rows, held_out = (number(metrics.get(name, 0), ",") for name in ("train_rows", "held_out_rows"))
        facts.append(("Rows", f"{rows} for training, {held_out} held out"))
    settings = {"steps": metrics.get("steps"), **{name: arguments.get(name) for name in _SETTINGS}}
    settings["seed"] = data.get("seed")
    chosen = [
        f"`{name}` {number(value, 'g') if isinstance(value, float) else escaped(value)}"
        for name, value in settings.items()
        if value is not None
    ]
    if chosen:
        facts.append(("Settings", Markdown(", ".join(chosen))))
    if config.hf_vs2_version:
        facts.append(("hf_vs2", config.hf_vs2_version))
    return facts


# Of the training arguments; paths of the machine are not among them.
_SETTINGS = (
    *("learning_rate", "warmup_ratio", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_grad_norm", "mixed_precision", "dead_latent_threshold"),
)


def _describe_data(data: dict[str, Any]) -> str:
    name = str(data.get("id") or "")
    on_hub = looks_like_hub_id(name)
    parts = ["not recorded" if not name else _link(name, "datasets/") if on_hub else code(Path(name).name)]
    if data.get("split"):
        parts.append(f"split {code(data['split'])}")
    if data.get("num_rows") is not None:
        parts.append(f"{number(data['num_rows'], ',')} images")
    if data.get("skipped"):
        parts.append(f"{number(data['skipped'], ',')} unreadable ones skipped")
    return ", ".join(parts)


def _describe_label_loss(term: Any) -> Markdown:
    if not isinstance(term, dict):
        return Markdown(f"used in training by {escaped(term)}")
    settings = ", ".join(f"{escaped(name)} {escaped(value)}" for name, value in term.items() if name != "name")
    return Markdown(f"used in training by {code(term.get('name'))}{f' ({settings})' if settings else ''}")


def _quality_facts(config: SAEConfig) -> Facts:
    metrics = config.training_metrics or {}
    layouts = {"fvu": ("FVU", ".4f"), "l0": ("L0", ".1f"), "dead_share": ("Dead features", ".1%")}
    return [
        (label, number(metrics[name], layout))
        for name, (label, layout) in layouts.items()
        if metrics.get(name) is not None
    ]


def _steering_facts(config: dict[str, Any]) -> Facts:
    """The settings that a VS2 checkpoint starts with."""
    facts = [
        ("method", code(config.get("method", "vs2"))),
        ("gamma", _gamma(config.get("gamma", 1.5))),
        ("lambda", f"{config.get('lambda_', 2.1):g}"),
    ]
    if edits := LatentEdits.of(config.get("edits")):
        facts.append(("features changed by hand", _edits(edits)))
    if config.get("fvu_threshold") not in (None, math.inf):
        return [*facts, ("gate", f"FVU up to {config['fvu_threshold']:.4g}")]
    if config.get("gate") is None:
        return [*facts, ("gate", "none: every image is steered")]
    rule = METHODS.get(config.get("method", "vs2"))
    what = "FVU" if rule is None or rule.reads_latents or config.get("edits") else "distance"
    return [*facts, ("gate", f"{what} up to its {config['gate']:g} quantile on held-out training images")]


def _edits(edits: LatentEdits) -> str:
    changes = [
        *(f"{latent} times {factor:g}" for latent, factor in edits.amplify),
        *(f"{latent} to 0" for latent in edits.suppress),
        *(f"{latent} to {value:g}" for latent, value in edits.set),
    ]
    return ", ".join(changes)


def _gamma(gamma: float | Sequence[float]) -> str:
    if isinstance(gamma, (int, float)):
        return f"{gamma:g}"
    return f"one for each feature, {min(gamma):g} to {max(gamma):g}"
