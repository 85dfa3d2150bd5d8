"""`report.html`: one file that a browser opens offline, without scripts; every word that comes from outside is
escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..atlas.writing import thumbnails
from ..data.images import one_line
from ..evaluation.evidence import SHOWN_EVIDENCE, evidence_text
from ..evaluation.metrics import gain_text
from ..files.atomic import replace_text
from .report import FEW_SHOT_TOLD, change_sentence, method_label


_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; \
base-uri 'none'; form-action 'none'">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write_page(
    path: Path, report: Mapping[str, Any], dataset: Any, image_column: str, image_indices: Sequence[int]
) -> None:
    """The page of a report.

    Args:
        dataset: with the images in `image_column`, of which those that the report shows are read.
        image_indices: the place in it of each row of the report.
    """
    checked = report["checked"] or {"fixed": [], "broken": []}
    shown = [*report["changes"]["clearest"], *checked["fixed"], *checked["broken"]]
    wanted = sorted({image_indices[one["row"]] for one in shown})
    jpegs = dict(thumbnails(dataset, image_column, wanted))
    pictures = {one["row"]: _data_uri(jpegs[image_indices[one["row"]]]) for one in shown}
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    body = "\n".join(
        part
        for part in (
            _top(report),
            _why(report),
            _changes(report, pictures),
            _checked(report, pictures),
            _calibration(report),
            _reject(report),
            _section("Not known", _list(report["not_known"])),
            _next(report),
            _foot(report),
        )
        if part
    )
    replace_text(
        path, _HEAD.format(title=escape(f"Adapted CLIP: {report['chosen']['label']}"), style=style, body=body)
    )


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _text(value: Any) -> str:
    """Anybody's words, on one line."""
    return escape(one_line(value))


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(one)}</li>" for one in sentences) + "</ul>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; those after the first are numbers."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _top(report: Mapping[str, Any]) -> str:
    chosen, images, changes = report["chosen"], report["images"], report["changes"]
    plain = chosen["method"] == "none"
    title = "Plain CLIP is kept" if plain else f"{chosen['label'][:1].upper()}{chosen['label'][1:]} added to CLIP"
    skipped = f", {images['skipped']:,} of them unreadable and left out" if images["skipped"] else ""
    facts = [
        (f"{images['number']:,}", "images"),
        (f"{len(report['labels']):,}", "labels"),
        (f"{changes['number']:,}", f"answers changed ({changes['share']:.1%})"),
    ]
    numbers = "".join(f"<div><dt>{escape(what)}</dt><dd>{number}</dd></div>" for number, what in facts)
    return (
        f"<header><h1>{escape(title)}</h1>\n<p>{_text(report['clip'])} on {_text(images['source'])}{skipped}. "
        f'Decided by {_text(chosen["decided_by"])}.</p>\n<dl class="numbers">{numbers}</dl></header>'
    )


def _why(report: Mapping[str, Any]) -> str:
    chosen = report["chosen"]
    evidence = chosen["evidence"]
    rows = [
        [escape(evidence_text(name, evidence[name])), escape(what)]
        for name, what in SHOWN_EVIDENCE.items()
        if name in evidence
    ]
    table = "".join(f'<tr><th scope="row">{number}</th><td>{what}</td></tr>' for number, what in rows)
    details = (
        '<details><summary>The numbers behind it</summary><table class="facts">'
        f"<tbody>{table}</tbody></table></details>"
        if rows
        else ""
    )
    return _section("What was chosen, and why", _list([*chosen["why"], report["sae"]["why"]]), details)


def _changes(report: Mapping[str, Any], pictures: Mapping[int, str]) -> str:
    changes = report["changes"]
    parts = [f"<p>{escape(change_sentence(report))}</p>"]
    if changes["number"]:
        rows = [[f"{_text(one['from'])} → {_text(one['to'])}", f"{one['number']:,}"] for one in changes["pairs"]]
        parts += [
            "<p>The clearest changes: plain CLIP's answer, then the adapted one, with the probability that each "
            "gives it.</p>",
            _gallery(_both_ways(changes["clearest"]), pictures),
            f"<details><summary>The commonest changes</summary>{_table(['from → to', 'images'], rows)}</details>",
        ]
    return _section("What it changes", *parts)


def _both_ways(examples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those between the same two labels side by side, one direction after the other."""
    pairs: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for one in examples:
        pairs.setdefault(tuple(sorted((one["plain"], one["adapted"]))), []).append(one)
    return [one for some in pairs.values() for one in sorted(some, key=lambda one: one["plain"])]


def _gallery(examples: Sequence[Mapping[str, Any]], pictures: Mapping[int, str]) -> str:
    cards = []
    for one in examples:
        truth = "" if one["checked"] is None else f'<span class="truth">checked: {_text(one["checked"])}</span>'
        cards.append(
            f'<li><img src="{pictures[one["row"]]}" alt="{_text(one["file"])}">'
            f'<span class="old">{_text(one["plain"])} <small>{one["plain_score"]:.0%}</small></span>'
            f'<span class="new">→ {_text(one["adapted"])} <small>{one["adapted_score"]:.0%}</small></span>'
            f'{truth}<span class="file">{_text(one["file"])}</span></li>'
        )
    return f'<ul class="gallery">{"".join(cards)}</ul>'


def _checked(report: Mapping[str, Any], pictures: Mapping[int, str]) -> str:
    checked = report["checked"]
    if not checked:
        return ""
    rows = []
    for one in [*checked["methods"], *checked["few_shot"]]:
        gain = gain_text(one["gain"], one["gain_ci"]) if "gain" in one else "-"
        rows.append([_text(method_label(one["method"])), f"{one['top1']:.1f}", gain])
    parts = [_table(["method", "right, %", "gain in points [95 % interval]"], rows)]
    if checked["few_shot"]:
        parts.append(f"<p>{escape(FEW_SHOT_TOLD)}</p>")
    for name, word in (("fixed", "Answers mended"), ("broken", "Answers spoilt")):
        if checked[name]:
            parts.append(f"<h3>{word}: {checked[f'num_{name}']}</h3>{_gallery(checked[name], pictures)}")
    return _section(f"On the {checked['n']:,} checked images", *parts)


def _calibration(report: Mapping[str, Any]) -> str:
    found = report["calibration"]
    both = [("plain CLIP", found["plain"]), ("adapted", found["adapted"])]
    header = ["answers of", "mean probability"]
    rows = [[escape(name), f"{one['mean_confidence']:.1%}"] for name, one in both]
    checked = "checked" in found["plain"]
    if checked:
        header += ["checked: mean probability", "right", "calibration error (ECE)"]
        for row, (_, one) in zip(rows, both, strict=True):
            known = one["checked"]
            row += [f"{known['mean_confidence']:.1%}", f"{known['accuracy']:.1%}", f"{known['ece']:.3f}"]
    words = (
        "ECE is the mean distance between the probability and the share that is right, over ten groups of images by "
        "probability: 0 is perfectly calibrated, and with few checked images some of it is chance."
        if checked
        else "Were the probabilities calibrated, the mean would be the share of right answers. Whether they are takes "
        "labels."
    )
    bars = "".join(_bars(name, one["shares"]) for name, one in both)
    return _section(
        "How sure the answers are",
        _table(header, rows),
        f"<p>{escape(words)}</p>",
        f'<div class="charts">{bars}</div>',
    )


def _bars(name: str, shares: Sequence[float]) -> str:
    """Share of the images in each tenth of the probability of the answer."""
    tallest = max(shares)
    bars = "".join(
        f'<rect x="{4 + 31 * place}" y="{84 - 76 * share / tallest:.1f}" width="26" '
        f'height="{76 * share / tallest:.1f}">'
        f"<title>probability {place / 10:.1f} to {(place + 1) / 10:.1f}: {share:.1%} of the images</title></rect>"
        for place, share in enumerate(shares)
    )
    told = ", ".join(f"{place / 10:.1f}-{(place + 1) / 10:.1f}: {share:.0%}" for place, share in enumerate(shares))
    return (
        f'<figure><svg viewBox="0 0 316 104" role="img" aria-label="{escape(name)}, images by probability: {told}">'
        f'{bars}<line x1="0" y1="84.5" x2="316" y2="84.5"/><text x="2" y="100">0</text>'
        f'<text x="152" y="100">0.5</text><text x="308" y="100">1</text></svg>'
        f"<figcaption>{escape(name)}: images by the probability of the answer</figcaption></figure>"
    )


def _reject(report: Mapping[str, Any]) -> str:
    rule = report["reject"]
    return _section(
        "None of these labels",
        f"<p>{rule['share']:.0%} of your images have a cosine of at most {rule['similarity']:.3f} with plain CLIP's "
        "answer. <code>hf-vs2 classify --reject</code> answers “none of these labels” below that. This is a "
        "quantile of your own images, not a measured error rate: it says how many images like yours it turns away, "
        "not how many others it lets pass.</p>",
    )


def _next(report: Mapping[str, Any]) -> str:
    steps = "".join(
        f"<li><p>{_text(one['what'])}</p><pre><code>{escape(one['command'])}</code></pre></li>"
        for one in report["next"]
    )
    return _section("Next", f"<ol>{steps}</ol>")


def _foot(report: Mapping[str, Any]) -> str:
    sae = report["sae"]
    prompts = ", ".join(f'"{template}"' for template in report["templates"][:8]) + "."
    return (
        f"<footer><p>Prompts: {_text(prompts)} SAE: {sae['num_latents']:,} latents, {sae['top_k']} active, "
        f"{sae.get('steps', 0):,} steps. hf_vs2 {_text(report['hf_vs2_version'])}, {_text(report['date'])}."
        "</p></footer>"
    )
