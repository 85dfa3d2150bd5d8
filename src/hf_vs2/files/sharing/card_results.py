"""What a model card takes from a result file: the table, per-class gains and losses, and the entries the Hub
understands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from transformers.utils import logging

from ...config.sae import SAEConfig
from ...methods import rows_by_name
from ..checkpoint_folder import RESULTS_NAME, CheckpointFolder, looks_like_hub_id
from ..json_files import as_bytes
from ..markdown import Markdown, code, escaped, number
from ..report import EvaluationResult, Results, format_table, method_name, result_of


logger = logging.get_logger(__name__)

_NUM_CLASSES_SHOWN = 5
_WIDTH = 41
_METHOD_NAMES = {"vs2+gate": "VS2 with gate", "vs2": "VS2"}


def read_results(folder: CheckpointFolder, results: Results | ResultFacts | None = None) -> ResultFacts | None:
    """The result file given, or the one that lies in the folder. A `ValueError` if the one given is no result file, or
    was measured with an SAE of other size or training data; one that merely lies there is left out, with a warning."""
    if isinstance(results, ResultFacts):
        return results
    saes = [SAEConfig(**config) for config in folder.sae_configs.values()]
    if results is not None:
        facts = ResultFacts.from_file(results)
        facts.check(saes)
        return facts
    place = folder.path / RESULTS_NAME
    if not place.is_file():
        return None
    try:
        facts = ResultFacts.from_file(place)
        facts.check(saes)
    except ValueError as error:
        logger.warning(f"{place} was left out of the model card. {error}")
        return None
    return facts


@dataclass(frozen=True)
class ResultFacts:
    """A result file, as cards show it."""

    result: EvaluationResult

    @classmethod
    def from_file(cls, results: Results) -> ResultFacts:
        """From a result, or the path of its file."""
        return cls(result_of(results))

    def check(self, saes: list[SAEConfig]) -> None:
        """Raise `ValueError` if what was measured can't be one of these SAEs."""
        measured, data = self.result.meta.get("sae"), self.result.meta.get("sae_training_data")
        if measured is None:
            return
        theirs = [({name: getattr(sae, name, None) for name in measured}, sae.training_data) for sae in saes]
        if (measured, data) not in theirs:
            raise ValueError(
                f"These results were measured with another SAE: {measured}, trained on {data}; in the checkpoint "
                f"there is {' and '.join(f'{shape}, trained on {origin}' for shape, origin in theirs)}. Evaluate this "
                "checkpoint, and give that result file."
            )

    @property
    def content(self) -> bytes:
        """The result file, as it lies beside the checkpoint: without the place where that was found."""
        meta = {name: value for name, value in self.result.meta.items() if name != "checkpoint"}
        return as_bytes(self.result.content | {"meta": meta})

    @property
    def class_names(self) -> list[str]:
        return self.result.per_class.get("class_names", [])

    @property
    def data_set(self) -> dict[str, Any]:
        """`id`, `split` and what else the evaluation recorded of its images."""
        meta = self.result.meta
        told = meta.get("dataset")
        told = {"id": told} if isinstance(told, str) else dict(told or {})
        return {"id": meta.get("dataset_id")} | {name: value for name, value in told.items() if value is not None}

    @property
    def data_set_name(self) -> str:
        name = _line(self.data_set.get("id") or "")
        if not name:
            return "images whose name was not recorded"
        return name if looks_like_hub_id(name) else Path(name).name

    @property
    def setting(self) -> Markdown:
        """One sentence: on what, and how many."""
        split = self.data_set.get("split")
        trained = "label_loss" in (self.result.meta.get("sae_training_data") or {})
        version = escaped(self.result.meta.get("hf_vs2_version", "(version not recorded)"))
        return Markdown(
            f"Measured with hf_vs2 {version} on "
            f"{escaped(self.data_set_name)}{f', split {code(split)}' if split else ''}: "
            f"{number(self.result.rows[0]['n'], ',')} images, {len(self.class_names)} classes. Labels were used to "
            f"count right answers{', and in training the SAE' if trained else ' only'}."
        )

    @property
    def table(self) -> Markdown:
        return Markdown(format_table(self.result))

    def outcome(self, encoder: Markdown) -> Markdown:
        """What the evaluation found with that CLIP, in a sentence: the gain of the checkpoint's own row, and beside it
        that of the best row without an SAE."""
        if not self.own_rows:
            return Markdown("")
        row = self.result.rows[self.own_rows[0]]
        plain = self.result.rows[self.result.index("clip", row["prompts"])]
        low, high = row["gain_ci"]
        verdict = (
            "is not shown to differ from plain CLIP"
            if low <= 0 <= high
            else "is better than plain CLIP"
            if low > 0
            else "is worse than plain CLIP"
        )
        text = (
            f"On {escaped(self.data_set_name)} with {encoder}, {_METHOD_NAMES[row['method']]} {verdict}: "
            f"{row['top1']:.1f} % against {plain['top1']:.1f} % top-1, a gain of {_interval(row)} points (95 % "
            f"interval, {code(row['prompts'])} prompts)."
        )
        others = [other for other in self._compared(row["prompts"]) if not _has_a_dictionary(other["method"])]
        if others:
            best = max(others, key=lambda other: other["gain"])
            text += f" The best row without an SAE, {escaped(method_name(best, label=True))}, has {_interval(best)}."
        return Markdown(text)

    @property
    def picture(self) -> Markdown:
        """Gains and their intervals on one axis, drawn in characters: a card has no other file."""
        if not self.own_rows:
            return Markdown("")
        rows = self._compared(self.result.rows[self.own_rows[0]]["prompts"])
        ends = [0.0, *(end for row in rows for end in (row["gain"], *row["gain_ci"]))]
        low, high = min(ends), max(ends)

        def at(value: float) -> int:
            return round((value - low) / (high - low or 1) * (_WIDTH - 1))

        # A stranger's result file may name a method anything: no mark of Markdown or HTML stays in the code block.
        names = [re.sub(r"[^\w +.,:'()/-]", "?", " ".join(method_name(row, label=True).split())) for row in rows]
        wide = max(map(len, names))
        ticks = f"{low:+.1f}".ljust(at(0)) + "0"
        lines = [" " * (wide + 2) + ticks + f"{high:+.1f}".rjust(_WIDTH - len(ticks))]
        for name, row in zip(names, rows, strict=True):
            cells = [" "] * _WIDTH
            cells[at(0)] = "│"
            first, last = (at(end) for end in row["gain_ci"])
            cells[first : last + 1] = "─" * (last + 1 - first)
            cells[at(row["gain"])] = "●"
            lines.append(f"{name:<{wide}}  {''.join(cells)}".rstrip())
        return Markdown("\n".join(["```text", *lines, "```"]))

    def _compared(self, prompts: str) -> list[dict[str, Any]]:
        return [row for row in self.result.rows if row["prompts"] == prompts and row["method"] != "clip"]

    @property
    def prompts(self) -> list[tuple[Markdown, Markdown]]:
        """Prompt set -> its templates, in one line."""
        sets = self.result.meta.get("templates") or {}
        return [(code(name), Markdown(", ".join(map(code, templates)))) for name, templates in sets.items()]

    @property
    def own_rows(self) -> list[int]:
        """Rows of the method that the checkpoint stands for: VS2 with its gate, or without where it has none."""
        for method in _METHOD_NAMES:
            rows = [index for index, row in enumerate(self.result.rows) if row["method"] == method]
            if rows:
                return rows
        return []

    @property
    def classes(self) -> dict[str, Any] | None:
        """The classes that gain and lose most, with the last prompt set; `None` without figures by class."""
        accuracy = self.result.per_class.get("accuracy")
        if not accuracy or not self.own_rows:
            return None
        index = self.own_rows[-1]
        row = self.result.rows[index]
        plain = accuracy[self.result.index("clip", row["prompts"])]
        support = self.result.per_class["support"]
        columns = zip(self.class_names, support, plain, accuracy[index], strict=True)
        ranked = sorted((row for row in columns if None not in row), key=lambda row: row[3] - row[2], reverse=True)
        gains = [row for row in ranked if row[3] > row[2]]
        losses = [row for row in ranked if row[3] < row[2]]
        same = len(ranked) - len(gains) - len(losses)
        return {
            "method": _METHOD_NAMES[row["method"]],
            "rows": gains[:_NUM_CLASSES_SHOWN] + losses[-_NUM_CLASSES_SHOWN:],
            "summary": Markdown(
                f"With the {code(row['prompts'])} prompts, {len(gains)} of {len(ranked)} classes gain, "
                f"{len(losses)} lose and {same} stay as they are under {_METHOD_NAMES[row['method']]}. Accuracy in %, "
                f"up to {_NUM_CLASSES_SHOWN} of each kind; with few images a class, expect chance to do much of this."
            ),
        }

    @property
    def eval_results(self) -> list[EvalResult]:
        """For `model-index`, accuracy as a fraction."""
        results = []
        for row in (self.result.rows[index] for index in self.own_rows):
            for key, name in (("top1", "Top-1"), ("top5", "Top-5")):
                if row.get(key) is None:
                    continue
                results.append(
                    EvalResult(
                        task_type="zero-shot-image-classification",
                        task_name="Zero-Shot Image Classification",
                        dataset_type=self.data_set_name,
                        dataset_name=self.data_set_name,
                        dataset_split=_line(self.data_set.get("split") or "") or None,
                        metric_type="accuracy",
                        metric_name=_line(
                            f"{name} accuracy, {_METHOD_NAMES[row['method']]}, {row['prompts']} prompts"
                        ),
                        metric_value=round(row[key] / 100, 6),
                    )
                )
        return results

    @property
    def leaderboard_entry(self) -> str | None:
        """Content of an `.eval_results/*.yaml` file, for the leaderboard of a benchmark on the Hub.

        Only where the result's `meta` names the benchmark's task (`task_id`) and the data set is one of the Hub:
        entries for data sets that are not registered as benchmarks are errors there.
        """
        task, data_set = self.result.meta.get("task_id"), self.data_set.get("id")
        if not task or not looks_like_hub_id(data_set) or not self.own_rows:
            return None
        row = self.result.rows[self.own_rows[-1]]
        entry = EvalResultEntry(
            dataset_id=str(data_set),
            task_id=task,
            value=row["top1"],
            date=self.result.meta.get("date"),
            notes=f"zero-shot top-1 accuracy in %, {_METHOD_NAMES[row['method']]}, {row['prompts']} prompts",
        )
        return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)


def _interval(row: dict[str, Any]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(row["gain"], *row["gain_ci"])


def _has_a_dictionary(name: str) -> bool:
    """Whether a row needs an SAE or something in its place. (The centroid does not, though its gate does.)"""
    row = rows_by_name().get(name)
    if row is None or row.rule.name == "centroid":
        return False
    return row.dictionary is not None or row.rule.reads_latents or bool(row.rule.views)


def _line(value: Any) -> str:
    return " ".join(str(value).split())
