#!/usr/bin/env python
"""What `hf-vs2 recommend` and fixed choices gain, on all draws that `scripts/true_clip.py` measured, by kind of
encoder.

    python scripts/recommend_table.py examples/results/true-clip/*.json

A draw is a scenario: what is fitted to and what is scored. Prints, as Markdown, the mean gain over plain CLIP in
points, the worst draw, and in how many draws more than a point is lost.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


CHOICES = (
    "recommended",
    "recommended, 100 labels",
    "distribution_norm",
    "full_distribution_norm",
    "prototypes",
    "balanced_prototypes",
    "TransCLIP",
)
HARM = -1.0


def summary(draws: list[dict[str, Any]]) -> str:
    fields = []
    for choice in CHOICES:
        gains = [draw["gains"][choice] for draw in draws]
        harmed = sum(gain < HARM for gain in gains) / len(gains)
        fields.append(f"{sum(gains) / len(gains):+.1f} ({min(gains):+.1f}), {harmed:.0%}")
    return " | ".join([str(len(draws)), *fields])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    results = [one for path in parser.parse_args().results for one in json.loads(path.read_text(encoding="utf-8"))]
    print("| encoder | images | draws |", " | ".join(CHOICES), "|\n|---|---|---:|" + "---:|" * len(CHOICES))
    for encoder in dict.fromkeys(one["encoder"] for one in results):
        ours = [one for one in results if one["encoder"] == encoder]
        for kind in dict.fromkeys(one["kind"].partition(":")[0] for one in ours):
            draws = [draw for one in ours if one["kind"].partition(":")[0] == kind for draw in one["each"]]
            print(f"| {encoder} | {kind} |", summary(draws), "|")
        print(f"| **{encoder}** | **all** |", summary([draw for one in ours for draw in one["each"]]), "|")
    print("| **all** | **all** |", summary([draw for one in results for draw in one["each"]]), "|")


if __name__ == "__main__":
    main()
