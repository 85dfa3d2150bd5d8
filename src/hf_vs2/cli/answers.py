"""How `hf-vs2 classify` shows, writes and counts its answers: as they come, with memory that does not grow."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .output import say


COLUMNS = ("image", "label", "score", "plain_label", "plain_score", "changed", "steered", "fvu", "distance")
"""Of a .csv; with `--top_k` followed by `label_2`, `score_2` and so on."""
_GAP = "  "


def with_change(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer of the pipeline, and whether its label is another than plain CLIP's."""
    return {**answer, "changed": answer["predictions"][0]["label"] != answer["plain"][0]["label"]}


def csv_columns(num_labels: int) -> list[str]:
    """The columns of [`flat`] for so many labels an image."""
    others = range(2, num_labels + 1)
    return [*COLUMNS, *(f"{name}_{place}" for place in others for name in ("label", "score"))]


def flat(answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer as a row of a .csv."""
    predictions, (plain, *_) = answer["predictions"], answer["plain"]
    row = {
        "image": answer["image"],
        "label": predictions[0]["label"],
        "score": f"{predictions[0]['score']:.6g}",
        "plain_label": plain["label"],
        "plain_score": f"{plain['score']:.6g}",
        "changed": _yes_or_no(answer["changed"]),
        "steered": " ".join(map(_yes_or_no, _each(answer["steered"]))),
        "fvu": _numbers(answer["fvu"], "{:.6g}"),
        "distance": _numbers(answer.get("distance"), "{:.6g}"),
    }
    for place, item in enumerate(predictions[1:], 2):
        row |= {f"label_{place}": item["label"], f"score_{place}": f"{item['score']:.6g}"}
    return row


class Summary:
    """Counts answers, fresh ones and those read back from a file."""

    def __init__(self) -> None:
        self.images = self.changed = self.steered = self.rejected = self.before = 0

    def missing(self, names: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> list[str]:
        """Count the rows of an earlier run, and give the images that have none."""
        answered = set()
        for row in rows:
            self.add(row)
            answered.add(row["image"])
        self.before = self.images
        return [name for name in dict.fromkeys(names) if name not in answered]

    def add(self, answer: Mapping[str, Any]) -> None:
        """Count an answer."""
        self.images += 1
        self.changed += answer["changed"] in (True, "yes")
        self.rejected += answer.get("rejected") is True
        steered = answer["steered"]
        self.steered += "yes" in steered.split() if isinstance(steered, str) else any(_each(steered))

    def lines(self, unreadable: int = 0) -> list[str]:
        """`9 images: 2 changed against plain CLIP (*), 7 steered, 2 left to plain CLIP.`, and what else there is to
        say."""
        changed = f"{self.changed:,} changed" + (" (*)" if self.changed else "")
        left = f"{self.steered:,} steered, {self.images - self.steered:,} left to plain CLIP"
        lines = [f"{_images(self.images)}: {changed}, {left}."]
        if self.rejected:
            lines.append(f"{_images(self.rejected)} of none of the labels.")
        if self.before:
            lines.append(f"{_images(self.before)} of these had an answer from an earlier run.")
        if unreadable:
            lines.append(f"{_images(unreadable)} left out, which can't be read.")
        return lines


class Table:
    """
    Answers as lines of equal columns, one image after another. On a terminal they fit its width: long names and labels
    are cut.

    Args:
        names: how the images are shown.
        labels: what they may be.
    """

    def __init__(self, names: Sequence[str], labels: Sequence[str]):
        self.image = max(map(len, (*names, "image")))
        self.label = max(map(len, (*labels, "plain CLIP")))
        self.started = False

    def lines(self, name: str, answer: Mapping[str, Any]) -> Iterator[str]:
        """The line of an image, with the next labels that were asked for at its end; before the first, the header."""
        distances = answer.get("distance")
        what, measured = ("FVU", answer["fvu"]) if distances is None else ("distance", distances)
        numbers = [_numbers(measured, "{:.3f}") or "-", " ".join(map(_yes_or_no, _each(answer["steered"])))]
        first, *others = ((item["label"], f"{item['score']:.3f}") for item in answer["predictions"])
        if not self.started:
            self.started = True
            self.widths = [max(len(what), len(numbers[0])), max(len("steered"), len(numbers[1]))]
            self._fit(len(others))
            heads = ["next labels"] if others else []
            yield self._line("image", ("label", "score"), ("plain CLIP", "score"), [what, "steered"], " ", heads)
        plain = answer["plain"][0]["label"], f"{answer['plain'][0]['score']:.3f}"
        further = [f"{_cut(label, self.label)} {score}" for label, score in others]
        yield self._line(name, first, plain, numbers, "*" if answer["changed"] else " ", further)

    def _fit(self, further: int) -> None:
        room = _terminal_width()
        if room is None:
            return
        room -= sum(self.widths) + 2 * len("0.000") + 6 * len(_GAP) + len(f"{_GAP}*") + further * len("  0.000 ")
        self.label = min(self.label, max(room * 3 // (10 + 3 * further), 10))
        self.image = min(self.image, max(room - (2 + further) * self.label, 10))

    def _line(
        self,
        name: str,
        label: Sequence[str],
        plain: Sequence[str],
        numbers: Sequence[str],
        mark: str,
        further: Sequence[str],
    ) -> str:
        cells = [_cut(name, self.image, at_end=False).ljust(self.image)]
        for text, score in (label, plain):
            cells += [_cut(text, self.label).ljust(self.label), score.rjust(5)]
        cells += (cell.rjust(width) for cell, width in zip(numbers, self.widths, strict=True))
        return _GAP.join([*cells, mark, ", ".join(further)]).rstrip()


def shown_names(names: Sequence[str], given: Sequence[str]) -> list[str]:
    """Images as the table names them: relative to the folder that was given; to its parent where several were."""
    folders = [os.path.join(name, "") for name in given if os.path.isdir(name)]
    inside = "" if len(given) == 1 else None
    shown = []
    for name in names:
        folder = next((folder for folder in folders if name.startswith(folder)), None)
        if folder is None:
            shown.append(name)
        else:
            head = os.path.basename(os.path.dirname(folder)) if inside is None else inside
            shown.append(os.path.join(head, name.removeprefix(folder)))
    return shown


def say_beside_bar(lines: Sequence[str], bar: Any) -> None:
    """[`say`], above a progress bar on the same terminal."""
    with bar.external_write_mode(file=sys.stdout):
        say(*lines)


def _terminal_width() -> int | None:
    """Columns to fit into; none where output goes to another program, which gets names whole."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return shutil.get_terminal_size().columns
    return None


def _images(number: int) -> str:
    return f"{number:,} image" + ("s" if number != 1 else "")


def _cut(text: str, width: int, at_end: bool = True) -> str:
    from ..data.images import one_line

    text = one_line(text)
    if len(text) <= width:
        return text
    head = width - 1 if at_end else (width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :] if not at_end else ''}"


def _each(value: Any) -> list[Any]:
    """One value an SAE, where there are several."""
    return value if isinstance(value, list) else [value]


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def _numbers(value: Any, form: str) -> str:
    return " ".join("" if number is None else form.format(number) for number in _each(value))
