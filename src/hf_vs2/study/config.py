"""The file that describes a study: which encoders, data sets, seeds, methods and prompts, and which ablations beside them."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config.sae import SAEConfig
from ..config.vs2_clip import Steering
from ..data.registry import DatasetInfo, dataset_info
from ..training.arguments import SAETrainingArguments
from .results.catalog import study_methods
from .results.cells import SPELLED


PROMPTS = ("single", "ensemble", "published")
"""Prompt sets: `"a photo of a {}."`, OpenAI's seven, and the templates that the registry has for the data set."""
SAE_FIELDS = ("top_k", "expansion_factor", "activation")
TRAINING_FIELDS = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "warmup_ratio",
    "per_device_train_batch_size",
    "max_grad_norm",
    "dead_latent_threshold",
    "calibration_share",
)


@dataclass(frozen=True)
class EncoderEntry:
    """A CLIP to study. `path` may stand in for the Hub id; published figures go by the id."""

    id: str
    name: str = ""
    revision: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", Path(self.id).name)

    @property
    def source(self) -> str:
        """What is loaded; a path in full, because stores and checkpoints that name it are used from elsewhere."""
        given = self.path or self.id
        return os.path.abspath(given) if os.path.exists(given) else given


@dataclass(frozen=True)
class SAESettings:
    """The SAE of the table's rows, and how it is trained; `training` holds fields of `SAETrainingArguments`."""

    top_k: int = 64
    expansion_factor: int = 4
    activation: str = "relu"
    training: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> SAESettings:
        check_keys(mapping, (*SAE_FIELDS, *TRAINING_FIELDS), "sae")
        training = {name: mapping[name] for name in TRAINING_FIELDS if name in mapping}
        SAETrainingArguments(output_dir="", **training)  # refuses values that cannot be trained with
        settings = cls(**{name: mapping[name] for name in SAE_FIELDS if name in mapping}, training=training)
        SAEConfig(hidden_size=settings.top_k, **{name: getattr(settings, name) for name in SAE_FIELDS})
        return settings


@dataclass(frozen=True)
class RetrievalSettings:
    """VS2++ and its baselines. Neighbours are found by `encoder` (a Hub id or path; by default the CLIP itself)."""

    num_neighbors: int = 50
    encoder: str | None = None
    revision: str | None = None
    rag_weight: float = 0.5
    """The `a` of weighted RAG, `E = a q + (1 - a) sum_j w_j r_j`."""

    @property
    def source(self) -> str | None:
        """The encoder, with its revision if one is asked for."""
        return self.encoder if self.revision is None else f"{self.encoder}@{self.revision}"


@dataclass(frozen=True)
class InnerLayers:
    """Methods that steer inner layers run the whole model on images; these limit how many, drawn at random."""

    train_limit: int | None = None
    test_limit: int | None = None


@dataclass(frozen=True)
class Ablations:
    """Settings to vary one at a time around the table's; an empty list leaves that ablation out."""

    top_k: tuple[int, ...] = ()
    expansion_factor: tuple[int, ...] = ()
    share: tuple[float, ...] = ()
    """Shares of the unlabelled training rows, above 0 and up to 1."""
    num_neighbors: tuple[int, ...] = ()
    pass_weight: tuple[float, ...] = ()
    sketch_rows: tuple[int, ...] = ()
    """How many unlabelled training rows prototypes are fitted to."""


@dataclass(frozen=True)
class Grid:
    """gamma x lambda of the heat map. It is shown, never chosen from."""

    gamma: tuple[float, ...]
    lambda_: tuple[float, ...]


@dataclass(frozen=True)
class GateShift:
    """Table 3: one SAE trained on the union of `trained_on`, applied to each of `apply_to`."""

    trained_on: tuple[str, ...]
    apply_to: tuple[str, ...] = ()
    quantiles: tuple[float, ...] = (0.9, 0.95, 0.99, 0.995)


@dataclass(frozen=True)
class StudyConfig:
    """
    A study, as its YAML file describes it (see `examples/studies/`).

    Args:
        output_dir (`str`): activations, SAEs, cells, tables and figures go there.
        encoders: Hub ids or local paths of CLIPs, or mappings of [`EncoderEntry`]'s fields.
        datasets: names of the registry, or mappings with overrides (`path`, `image_column`, ...) or of a data set of your own.
        seeds: of the SAEs.
        prompts: some of [`PROMPTS`].
        methods: rows of the table, see [`hf_vs2.study.results.catalog`]; those compared by default.
        sae, steering, retrieval, inner_layers, ablations, grid, gate_shift: see the classes of those names.
        views (`int`): augmented views beside the image itself, for the `ens_aug` rows.
        pass_weight (`float`): `w_aux` of PASS in the table.
        cost, agreement (`bool`): measure compute, and how alike the steering vectors of different SAEs are.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value that cannot be used.
    """

    output_dir: str
    encoders: tuple[EncoderEntry, ...]
    datasets: tuple[DatasetInfo, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    prompts: tuple[str, ...] = ("single", "ensemble")
    methods: tuple[str, ...] = ()
    sae: SAESettings = field(default_factory=SAESettings)
    steering: Steering = field(default_factory=lambda: Steering(gate=0.99))
    retrieval: RetrievalSettings = field(default_factory=RetrievalSettings)
    inner_layers: InnerLayers = field(default_factory=InnerLayers)
    views: int = 4
    pass_weight: float = 0.8
    ablations: Ablations = field(default_factory=Ablations)
    grid: Grid | None = None
    gate_shift: GateShift | None = None
    cost: bool = True
    agreement: bool = True

    @classmethod
    def from_yaml(cls, path: str | Path, output_dir: str | None = None) -> StudyConfig:
        """Read a study's file; `output_dir` takes the place of its own. Relative paths count from the working directory."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no study file {path}: give the path of a YAML file, see docs/study.md.")
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not a YAML file: {error}") from error
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} must hold `key: value` lines: output_dir, encoders, datasets and so on.")
        return cls.from_dict({**content, "output_dir": output_dir or content.get("output_dir")})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StudyConfig:
        """The same from a mapping."""
        check_keys(content, [one.name for one in dataclasses.fields(cls)], "the study")
        missing = [name for name in ("output_dir", "encoders", "datasets") if not content.get(name)]
        if missing:
            raise ValueError(f"the study does not say its {' and '.join(missing)}.")
        given = dict(content)
        given["encoders"] = tuple(
            EncoderEntry(id=one) if isinstance(one, str) else build(EncoderEntry, one, "encoders")
            for one in _list(content["encoders"])
        )
        given["datasets"] = tuple(dataset_info(one) for one in _list(content["datasets"]))
        for name in ("seeds", "prompts", "methods"):
            if name in given:
                given[name] = tuple(_list(given[name]))
        if "sae" in given:
            given["sae"] = SAESettings.of(given["sae"] or {})
        if "steering" in given:
            given["steering"] = build(Steering, {"gate": 0.99} | dict(given["steering"] or {}), "steering")
        parts = {
            "retrieval": RetrievalSettings,
            "inner_layers": InnerLayers,
            "ablations": Ablations,
            "grid": Grid,
            "gate_shift": GateShift,
        }
        for name, part in parts.items():
            if given.get(name) is not None:
                given[name] = build(part, given[name], name)
        return cls(**given)

    def __post_init__(self) -> None:
        known = study_methods()
        chosen = self.methods or tuple(name for name, method in known.items() if method.default)
        object.__setattr__(self, "methods", tuple(SPELLED.get(name, name) for name in chosen))
        _check_choices("methods", self.methods, tuple(known))
        _check_choices("prompts", self.prompts, PROMPTS)
        named: tuple[tuple[str, list[Any]], ...] = (
            ("encoders", [one.name for one in self.encoders]),
            ("datasets", [one.name for one in self.datasets]),
            ("seeds", list(self.seeds)),
        )
        for what, names in named:
            doubled = [name for name in names if names.count(name) > 1]
            if not names or doubled:
                raise ValueError(f"{what}: " + (f"{doubled[0]!r} occurs twice." if doubled else "there is none."))
        steering = self.steering
        if steering.method != "vs2" or isinstance(steering.gamma, tuple) or steering.gate is None:
            raise ValueError("steering takes one gamma, one lambda_ and a gate quantile; methods go under `methods`.")
        if not all(0 < share <= 1 for share in self.ablations.share):
            raise ValueError(f"ablations.share={list(self.ablations.share)}: shares lie above 0 and up to 1.")
        if self.gate_shift is not None:
            names = [one.name for one in self.datasets]
            _check_choices("gate_shift", (*self.gate_shift.trained_on, *self.gate_shift.apply_to), tuple(names))

    def dataset(self, name: str) -> DatasetInfo:
        """The data set of that name in this study."""
        return next(one for one in self.datasets if one.name == name)

    def encoder(self, name: str) -> EncoderEntry:
        """The encoder of that name in this study."""
        return next(one for one in self.encoders if one.name == name)


def build(cls: type, mapping: Any, where: str) -> Any:
    """A dataclass from a mapping; lists become tuples.

    Raises:
        ValueError: on keys that it does not have, or that are missing.
    """
    if not isinstance(mapping, Mapping):
        raise ValueError(f"{where} must be `key: value` lines, not {mapping!r}.")
    fields = {one.name: one for one in dataclasses.fields(cls)}
    # YAML authors write the paper's symbol; Python cannot.
    given = {"lambda_" if key == "lambda" else key: value for key, value in mapping.items()}
    check_keys(given, list(fields), where)
    needed = [
        name
        for name, one in fields.items()
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING and name not in given
    ]
    if needed:
        raise ValueError(f"{where} lacks {', '.join(needed)}.")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})


def check_keys(mapping: Mapping[str, Any], known: Any, where: str) -> None:
    """Refuse keys that nobody reads."""
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f": {', '.join(known)}"
            raise ValueError(f"{where} has no setting {key!r}{hint}")


def _check_choices(what: str, chosen: tuple[str, ...], known: tuple[str, ...]) -> None:
    for one in chosen:
        if one not in known:
            near = difflib.get_close_matches(str(one), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use some of {', '.join(known)}."
            raise ValueError(f"{what}: {one!r} is not known; {hint}")


def _list(value: Any) -> list[Any]:
    if isinstance(value, (str, Mapping)) or not hasattr(value, "__iter__"):
        return [value]
    return list(value)
