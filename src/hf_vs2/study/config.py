"""The file that describes a study: which encoders, data sets, seeds, methods and prompts, and which ablations beside
them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.sae import ACTIVATIONS, SAEConfig
from ..config.schema import (
    FILE_NAME,
    FLAG,
    LARGEST_EXPANSION,
    LARGEST_SEED,
    TEXT,
    Checked,
    Kind,
    check_fields,
    kinds_of,
    many,
    number,
    one_of,
    optional,
    part,
    part_of,
    read_fields,
    setting,
    shown,
    whole,
)
from ..config.steering import FINITE, QUANTILE, Steering
from ..data.registry import DatasetInfo, dataset_info
from ..files.yaml_files import read_yaml
from ..methods import GATE, find_method
from ..training.arguments import SAETrainingArguments
from .results.catalog import study_methods
from .results.cells import SPELLED


PROMPTS = ("single", "ensemble", "published")
"""Prompt sets: `"a photo of a {}."`, OpenAI's seven, and the templates that the registry has for the data set."""
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


def _encoder_name(value: str, name: str) -> str:
    return value if not value else FILE_NAME.read(value, name)  # without one, that of the id


@dataclass(frozen=True)
class EncoderEntry:
    """A CLIP to study. `path` may stand in for the Hub id; published figures go by the id. Folders and files are
    called by `name`."""

    id: str = setting(TEXT)
    name: str = setting(Kind("a text", lambda value: isinstance(value, str), _encoder_name), default="")
    revision: str | None = setting(optional(TEXT), default=None)
    path: str | None = setting(optional(TEXT), default=None)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.name:
            name = FILE_NAME.read(Path(self.id).name, f"the name of encoder {shown(self.id)}")
            object.__setattr__(self, "name", name)

    @property
    def source(self) -> str:
        """What is loaded; a path in full, because stores and checkpoints that name it are used from elsewhere."""
        given = self.path or self.id
        return os.path.abspath(given) if os.path.exists(given) else given


@dataclass(frozen=True)
class SAESettings:
    """The SAE of the table's rows, and how it is trained; `training` holds fields of `SAETrainingArguments`."""

    top_k: int = setting(whole(1), default=64)
    expansion_factor: int = setting(whole(1, LARGEST_EXPANSION), default=4)
    activation: str = setting(one_of(ACTIVATIONS), default="relu")
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self)
        SAETrainingArguments(output_dir=".", **self.training)  # refuses values that exclude each other

    @classmethod
    def of(cls, **given: Any) -> SAESettings:
        """From the keys of a study's file."""
        training = {name: given.pop(name) for name in TRAINING_FIELDS if name in given}
        return cls(**given, training=training)


@dataclass(frozen=True)
class RetrievalSettings(Checked):
    """VS2++ and its baselines. Neighbours are found by `encoder` (a Hub id or path; by default the CLIP itself)."""

    num_neighbors: int = setting(whole(1), default=50)
    encoder: str | None = setting(optional(TEXT), default=None)
    revision: str | None = setting(optional(TEXT), default=None)
    rag_weight: float = setting(number(0, 1), default=0.5)
    """The `a` of weighted RAG, `E = a q + (1 - a) sum_j w_j r_j`."""

    @property
    def source(self) -> str | None:
        """The encoder, with its revision if one is asked for."""
        return self.encoder if self.revision is None else f"{self.encoder}@{self.revision}"


@dataclass(frozen=True)
class InnerLayers(Checked):
    """Methods that steer inner layers run the whole model on images; these limit how many, drawn at random."""

    train_limit: int | None = setting(optional(whole(2)), default=None)
    test_limit: int | None = setting(optional(whole(1)), default=None)


@dataclass(frozen=True)
class Ablations(Checked):
    """Settings to vary one at a time around the table's; an empty list leaves that ablation out."""

    top_k: tuple[int, ...] = setting(many(whole(1)), default=())
    expansion_factor: tuple[int, ...] = setting(many(whole(1, LARGEST_EXPANSION)), default=())
    share: tuple[float, ...] = setting(many(number(above=0, most=1)), default=())
    """Shares of the unlabelled training rows, above 0 and up to 1."""
    num_neighbors: tuple[int, ...] = setting(many(whole(1)), default=())
    pass_weight: tuple[float, ...] = setting(many(number(0)), default=())
    sketch_rows: tuple[int, ...] = setting(many(whole(1, 10_000_000)), default=())
    """How many unlabelled training rows prototypes are fitted to."""


@dataclass(frozen=True)
class Grid(Checked):
    """gamma x lambda of the heat map. It is shown, never chosen from."""

    gamma: tuple[float, ...] = setting(many(number(), least=1))
    lambda_: tuple[float, ...] = setting(many(number(), least=1))


@dataclass(frozen=True)
class GateShift(Checked):
    """Table 3: one SAE trained on the union of `trained_on`, applied to each of `apply_to`."""

    trained_on: tuple[str, ...] = setting(many(TEXT, least=1))
    apply_to: tuple[str, ...] = setting(many(TEXT), default=())
    quantiles: tuple[float, ...] = setting(many(QUANTILE, least=1), default=(0.9, 0.95, 0.99, 0.995))


def _steering(**given: Any) -> Steering:
    return Steering(**{"gate": 0.99, **given})


def _dataset(value: Any, name: str) -> DatasetInfo:
    info = value if isinstance(value, DatasetInfo) else dataset_info(value)
    FILE_NAME.read(info.name, f"{name}.name")
    return info


_ENCODER = part_of(EncoderEntry)
_ENTRY = Kind(
    "a Hub id, a path, or `key: value` lines",
    lambda value: isinstance(value, str) or _ENCODER.accepts(value),
    lambda value, name: _ENCODER.read({"id": value} if isinstance(value, str) else value, name),
)
_DATASET = Kind(
    "a name, or `key: value` lines", lambda value: isinstance(value, (str, Mapping, DatasetInfo)), _dataset
)
_SAE = {
    **kinds_of(SAESettings),
    **{name: kind for name, kind in kinds_of(SAETrainingArguments).items() if name in TRAINING_FIELDS},
}


def _usual_methods() -> tuple[str, ...]:
    return tuple(name for name, method in study_methods().items() if method.default)


def _method_name(value: str, name: str) -> str:
    find_method(value.removesuffix(GATE))  # which asks installed packages for one that is not registered
    return one_of(tuple(study_methods())).read(value, name)


_METHOD = Kind(
    "the name of a method",
    lambda value: isinstance(value, str),
    lambda value, name: _method_name(SPELLED.get(value, value), name),  # names of earlier versions too
)
_PARTS = ("sae", "steering", "retrieval", "inner_layers", "ablations", "grid", "gate_shift")
"""Keys that may stand without a value, as if they were left out."""
_STEERING = {"gamma": FINITE, "lambda_": FINITE, "gate": QUANTILE}


@dataclass(frozen=True)
class StudyConfig:
    """
    A study, as its YAML file describes it (see `examples/studies/`).

    Args:
        output_dir (`str`): activations, SAEs, cells, tables and figures go there.
        encoders: Hub ids or local paths of CLIPs, or mappings of [`EncoderEntry`]'s fields.
        datasets: names of the registry, or mappings with overrides (`path`, `image_column`, ...) or of a data set of
            your own.
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

    output_dir: str = setting(TEXT)
    encoders: tuple[EncoderEntry, ...] = setting(many(_ENTRY, least=1))
    datasets: tuple[DatasetInfo, ...] = setting(many(_DATASET, least=1))
    seeds: tuple[int, ...] = setting(many(whole(0, LARGEST_SEED), least=1), default=(0, 1, 2))
    prompts: tuple[str, ...] = setting(many(one_of(PROMPTS), least=1), default=("single", "ensemble"))
    methods: tuple[str, ...] = setting(many(_METHOD, least=1), default_factory=_usual_methods)
    sae: SAESettings = setting(part(SAESettings.of, _SAE, SAESettings), default_factory=SAESettings)
    steering: Steering = setting(part(_steering, _STEERING, Steering), default_factory=_steering)
    retrieval: RetrievalSettings = setting(part_of(RetrievalSettings), default_factory=RetrievalSettings)
    inner_layers: InnerLayers = setting(part_of(InnerLayers), default_factory=InnerLayers)
    views: int = setting(whole(0, 1000), default=4)
    pass_weight: float = setting(number(0), default=0.8)
    ablations: Ablations = setting(part_of(Ablations), default_factory=Ablations)
    grid: Grid | None = setting(optional(part_of(Grid)), default=None)
    gate_shift: GateShift | None = setting(optional(part_of(GateShift)), default=None)
    cost: bool = setting(FLAG, default=True)
    agreement: bool = setting(FLAG, default=True)

    @classmethod
    def from_yaml(cls, path: str | Path, output_dir: str | None = None) -> StudyConfig:
        """Read a study's file; `output_dir` takes the place of its own. Relative paths count from the working
        directory."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no study file {path}: give the path of a YAML file, see docs/study.md.")
        content = read_yaml(Path(path), path)
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} must hold `key: value` lines: output_dir, encoders, datasets and so on.")
        return cls.from_dict({**content, "output_dir": output_dir or content.get("output_dir")})

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StudyConfig:
        """The same from a mapping."""
        missing = [name for name in ("output_dir", "encoders", "datasets") if not content.get(name)]
        if missing:
            raise ValueError(f"the study does not say its {' and '.join(missing)}.")
        given = {key: value for key, value in content.items() if value is not None or key not in _PARTS}
        return cls(**read_fields(given, kinds_of(cls), "", what="the study"))

    def __post_init__(self) -> None:
        check_fields(self)
        named: tuple[tuple[str, list[Any]], ...] = (
            ("encoders", [one.name for one in self.encoders]),
            ("datasets", [one.name for one in self.datasets]),
            ("seeds", list(self.seeds)),
        )
        for what, names in named:
            doubled = [name for name in names if names.count(name) > 1]
            if doubled:
                raise ValueError(f"{what}: {doubled[0]!r} occurs twice.")
        steering = self.steering
        if steering.method != "vs2" or isinstance(steering.gamma, tuple) or steering.gate is None:
            raise ValueError("steering takes one gamma, one lambda_ and a gate quantile; methods go under `methods`.")
        if self.gate_shift is not None:
            known = one_of([one.name for one in self.datasets])
            for name in (*self.gate_shift.trained_on, *self.gate_shift.apply_to):
                known.read(name, "gate_shift")

    def check_sizes(self, encoder: EncoderEntry, hidden_size: int) -> None:
        """Refuse SAEs that an encoder of this width can't have.

        Raises:
            ValueError: naming the setting.
        """
        sae, varied = self.sae, self.ablations
        for top_k in (sae.top_k, *varied.top_k):
            for factor in (sae.expansion_factor, *varied.expansion_factor):
                if sae.top_k == top_k or factor == sae.expansion_factor:  # one is varied at a time
                    try:
                        SAEConfig(hidden_size=hidden_size, top_k=top_k, expansion_factor=factor)
                    except ValueError as error:
                        raise ValueError(f"{encoder.name}: {error}") from error

    def dataset(self, name: str) -> DatasetInfo:
        """The data set of that name in this study."""
        return next(one for one in self.datasets if one.name == name)

    def encoder(self, name: str) -> EncoderEntry:
        """The encoder of that name in this study."""
        return next(one for one in self.encoders if one.name == name)
