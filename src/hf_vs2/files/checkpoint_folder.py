"""Checkpoints on disk, known by what their files say: one SAE, several SAEs (one a layer, in subfolders), or a VS2
model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .atomic import finish_replacement
from .json_files import read_object
from .place import is_hub_id


SAE_TYPE = "vs2_sae"
VS2_TYPE = "vs2_clip"
RESULTS_NAME = "results.json"
CARD_NAME = "README.md"
TRAINING_LOG_NAME = "training_log.json"
# The corpus of a VS2 checkpoint, where its config says that it holds one.
CORPUS_FOLDER = "corpus"
CORPUS_CONFIG_NAME = "corpus.json"
CORPUS_ROWS_NAME = "corpus.safetensors"
CORPUS_FILES = (f"{CORPUS_FOLDER}/{CORPUS_CONFIG_NAME}", f"{CORPUS_FOLDER}/{CORPUS_ROWS_NAME}")

# What is known of the unlabelled images that an SAE is for, and what was fitted on them for label sets.
STATISTICS_NAME = "statistics.safetensors"
LABEL_SETS_NAME = "label_sets.safetensors"
TENSOR_FILES = ("model*.safetensors*", STATISTICS_NAME, LABEL_SETS_NAME, *CORPUS_FILES)
"""Patterns of the files that one save writes together."""
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.txt"),
)
# What makes up a checkpoint. A training folder holds more (training state, logs with paths of the machine): that stays
# there.
_PARTS = (
    CONFIG_NAME,
    SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    "model-*-of-*.safetensors",
    STATISTICS_NAME,
    LABEL_SETS_NAME,
    *PROCESSOR_FILES,
    *TOKENIZER_FILES,
)


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder that holds one checkpoint, or SAE checkpoints in its subfolders."""

    path: Path
    model_type: str
    """`"vs2_sae"` or `"vs2_clip"`."""
    configs: dict[str, dict[str, Any]]
    """Subfolder -> its `config.json`; the folder itself is `""`."""

    @classmethod
    def open(cls, path: str | os.PathLike) -> CheckpointFolder:
        """
        Look at a folder.

        Raises:
            `OSError`: if there is no such folder. `ValueError`: if it holds no checkpoint of ours, or a broken one.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{path}: there is no such folder. Give the folder that save_pretrained or training wrote."
            )
        for place in (folder, *folder.iterdir()):
            finish_replacement(place)
        if (folder / CONFIG_NAME).is_file():
            config = _read_config(folder)
            return cls(folder, config["model_type"], {"": config})
        configs = {
            child.name: _read_config(child)
            for child in sorted(folder.iterdir())
            if (child / CONFIG_NAME).is_file() and not child.name.startswith(".")
        }
        others = [name for name, config in configs.items() if config["model_type"] != SAE_TYPE]
        if not configs or others:
            found = f"{others[0]}/ holds a VS2 checkpoint" if others else f"there is no {CONFIG_NAME}"
            raise ValueError(
                f"{path} holds no checkpoint: {found}. Expected the {CONFIG_NAME} of an SAE or VS2 checkpoint, or "
                "subfolders with one SAE checkpoint each."
            )
        return cls(folder, SAE_TYPE, configs)

    @property
    def holds_several(self) -> bool:
        """Whether the checkpoints lie in subfolders."""
        return "" not in self.configs

    @property
    def files(self) -> dict[str, Path]:
        """Path in the repository -> file, for everything that makes up the checkpoints. The card is not among them."""
        found = {
            f"{name}/{file.name}" if name else file.name: file
            for name in self.configs
            for file in sorted(_parts_of(self.path / name))
        }
        if self.configs.get("", {}).get("holds_corpus"):
            found |= {name: self.path / name for name in CORPUS_FILES}
        return found

    @property
    def sae_configs(self) -> dict[str, dict[str, Any]]:
        """The SAEs inside, by subfolder; for a VS2 checkpoint by layer."""
        if self.model_type == SAE_TYPE:
            return self.configs
        return {f"layer {config.get('layer')}": config for config in self.configs[""].get("sae_configs") or []}

    def training_arguments(self, name: str) -> dict[str, Any]:
        """How the SAE in a subfolder was trained, from the log that training left beside it; empty without one."""
        log = self.path / name / TRAINING_LOG_NAME
        found = read_object(log, "the log of a training") if log.is_file() else {}
        if found.get("metrics", {}) is None:  # of a training that goes on
            return {}
        arguments = found.get("args", {})
        if not isinstance(arguments, dict):
            raise ValueError(f"{log} is not the log of a training: args is {arguments!r}. Remove it, or train again.")
        return arguments


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    config = read_object(path)
    model_type = config.get("model_type")
    if model_type not in (SAE_TYPE, VS2_TYPE):
        raise ValueError(
            f"{path} describes a model of type {model_type!r}; expected an SAE ({SAE_TYPE!r}) or a VS2 checkpoint "
            f"({VS2_TYPE!r})."
        )
    _check_saes(path, config)
    if not any(name.match("model*.safetensors") for name in _parts_of(folder)):
        raise ValueError(f"{folder} has a {CONFIG_NAME} but no {SAFE_WEIGHTS_NAME}. Save the model there again.")
    declared = [name for name in CORPUS_FILES if config.get("holds_corpus")]
    declared += [STATISTICS_NAME] if config.get("holds_statistics") else []
    declared += [LABEL_SETS_NAME] if config.get("holds_label_sets") else []
    missing = [name for name in declared if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} should hold {missing[0]}, by its {CONFIG_NAME}. Save the model there again.")
    return config


def _check_saes(path: Path, config: dict[str, Any]) -> None:
    """Everything that reads a folder makes configs of these, and relies on it."""
    from ..config.sae import SAEConfig  # not at import: it needs torch

    saes = [config] if config["model_type"] == SAE_TYPE else config.get("sae_configs")
    if not isinstance(saes, list):
        raise ValueError(f"{path}: sae_configs must be a list.")
    for sae in saes:
        try:
            SAEConfig.from_dict(sae)
        except ValueError as error:
            raise ValueError(f"{path} can't be used. {error}") from error


def _parts_of(folder: Path) -> Iterator[Path]:
    return (file for pattern in _PARTS for file in folder.glob(pattern) if file.is_file())


def looks_like_hub_id(name: str | None) -> bool:
    """Whether `name` is `owner/repository` rather than a path of this machine."""
    return isinstance(name, str) and name.count("/") == 1 and not os.path.exists(name) and is_hub_id(name)


def shown_name(name: str) -> str:
    """A Hub id as it is; of a path its last part: what is shown around tells nobody of the folders of one machine."""
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name


def local_paths(record: Any) -> list[str]:
    """Every place on this machine that a configuration or result file names, so that it can be told before others read
    it."""
    if isinstance(record, (dict, list)):
        inner = record.values() if isinstance(record, dict) else record
        return [path for value in inner for path in local_paths(value)]
    if not isinstance(record, str) or os.sep not in record or len(record) > 1024:
        return []
    return [record] if os.path.isabs(record) or os.path.exists(record) else []
