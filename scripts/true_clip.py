#!/usr/bin/env python
"""What helps without labels on *your* CLIP? Every rule, on even, one-sided, few and foreign images: scores in points
over plain CLIP.

    python scripts/true_clip.py --embeddings FOLDER --output results.json        # unit embeddings, see below
    python scripts/true_clip.py --rows TEST+MORE --clip CLIP --output results.json   # CLS rows of the last layer
    python scripts/true_clip.py --study examples/studies/paper.yaml --output results.json   # images: extracted once

`--embeddings`: safetensors files with `image_embeds` (n, d), `label` (n,), `class_embeds` (C, d) and, if there are
any, `unlabelled_extra` (m, d). `--rows`: activation stores, or safetensors files with `cls`, `label` and the class
names as JSON in the metadata (`names`); what follows a `+` is only fitted to. Each set is split at random into halves;
rules are fitted to one half and `unlabelled_extra`, and scored on the other. How images are drawn stands in
`scripts/scenarios.py`. Writes JSON, prints Markdown; docs/true-clip.md tells what came out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from draws import trained, trained_sae
from rivals import Scores, first_rule, transclip, zlap
from scenarios import LEAST_ROWS, ImageSet, Scenario, embedding_sets, row_sets, scenarios_of, study_sets
from torch.nn.functional import normalize

from hf_vs2.evaluation.controls import control_model
from hf_vs2.evaluation.methods import controls
from hf_vs2.evaluation.recommendation import decide, gather_evidence, weigh
from hf_vs2.functional.anchored import anchored_scores, fit_anchored_prototypes
from hf_vs2.functional.equations import centroid_steer, steer, steering_vector
from hf_vs2.functional.label_free import (
    LabelFit,
    balanced_mean,
    distribution_norm_scores,
    fit_balanced_prototypes,
    fit_prototypes,
    label_scores,
    norm_fit,
)
from hf_vs2.methods import METHODS


LABELLED = 100
Rule = Callable[[torch.Tensor, torch.Tensor, float], Scores]


def fitted(fit: Callable[[torch.Tensor, torch.Tensor], LabelFit]) -> Rule:
    def rule(f: torch.Tensor, W: torch.Tensor, T: float) -> Scores:
        known = fit(f, W)
        return lambda images: label_scores(images, known)

    return rule


def distribution(coefficient: float, score: str) -> Rule:
    return lambda f, W, T: lambda images: distribution_norm_scores(images, W, f.mean(0), W.mean(0), coefficient, score)


def centroid(f: torch.Tensor, W: torch.Tensor, T: float) -> Scores:
    return lambda images: normalize(centroid_steer(images, f.mean(0), 1.05), dim=-1) @ W.T


def anchored(f: torch.Tensor, W: torch.Tensor, T: float) -> Scores:
    known = fit_anchored_prototypes(f, W, T)
    return lambda images: anchored_scores(images, W, known)


RULES: dict[str, Rule] = {
    "centroid, in embeddings": centroid,
    "distribution_norm": fitted(lambda f, W: norm_fit(W, f.mean(0), 0.25)),
    "distribution norm, dot, 0.5": distribution(0.5, "dot"),
    "full_distribution_norm": fitted(lambda f, W: norm_fit(W, f.mean(0))),
    "balanced_norm": fitted(lambda f, W: norm_fit(W, balanced_mean(f, W))),
    "prototypes": fitted(lambda f, W: fit_prototypes(f, W, f.mean(0))),
    "balanced_prototypes": fitted(fit_balanced_prototypes),
    "first rule, beta 15": first_rule(15.0),
    "first rule, beta 30": first_rule(30.0),
    "anchored_prototypes": anchored,
    "TransCLIP": transclip,
    "ZLaP": zlap,
}


STEERED = (
    *("centroid", "vs2", "vs2_random", "vs2_pca", "corrected+distribution_norm", "prototypes+pca", "prototypes+sae"),
    "prototypes+random",
)
"""What needs CLS rows, and mostly an SAE."""


def evidence_of(f: torch.Tensor, W: torch.Tensor, T: float) -> dict[str, Any]:
    """What the rows say without labels, and what `hf-vs2 recommend` makes of it."""
    evidence = gather_evidence(f, W, T)
    found = asdict(evidence) | {"image mean": f.mean(0).norm().item(), "text mean": W.mean(0).norm().item()}
    return found | {"recommended": decide(evidence)[0]}


def with_labels(one: Scenario, start: str, fits: dict[str, Scores], number: int = LABELLED) -> str:
    """What `hf-vs2 recommend` says when so many of the images that are fitted to have labels; none is of the scored
    ones."""
    own = one.fit[one.fit < len(one.own.embeds)] if one.source.name == one.own.name else one.fit[:0]
    chosen = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(len(own)))[:number]]
    embeds, labels = one.own.embeds[chosen], one.own.labels[chosen]
    right = {name: scores(embeds).argmax(-1) == labels for name, scores in fits.items() if name in METHODS}
    right["none"] = (embeds @ one.own.classes.T).argmax(-1) == labels
    return weigh(start, right)[0]


def steered(one: Scenario, steps: int) -> dict[str, torch.Tensor]:
    """Answers of what steers CLS rows, and of its controls, with an SAE and statistics of the rows that are fitted to."""
    if one.source.cls is None or one.own.cls is None or one.own.clip is None:
        return steered_embeddings(one, steps)
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        model = trained(one.own.clip, one.source.cls[one.fit], folder, steps)
    known, others = controls(), {dictionary: control_model(model, dictionary) for dictionary in ("random", "pca")}
    answers = {}
    for name in STEERED:
        method, dictionary = known.get(name, (name, ""))
        using = others.get(dictionary, model)
        with using.steering(method=method, gate=None):
            images = using.image_features_from_cls(one.own.cls[one.scored])
            answers[f"{name}, at CLS"] = using.class_logits(images, one.own.classes).argmax(-1)
    return answers


def steered_embeddings(one: Scenario, steps: int) -> dict[str, torch.Tensor]:
    """Answers of VS2's rule in embedding space, which is not the paper's site, where there are no CLS rows."""
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        sae = trained_sae(one.rows, folder, steps)
    code, answers = sae(one.images), {}
    for alpha in (1.05, 0.25):
        vector = steering_vector(code.latent_values, code.latent_indices, sae.W_dec, 1.5)
        moved = normalize(steer(one.images, vector, alpha / 0.5), dim=-1)
        answers[f"vs2, in embeddings, alpha {alpha}"] = (moved @ one.own.classes.T).argmax(-1)
    return answers


@torch.no_grad()
def measure(one: Scenario, rules: dict[str, Rule], sae_steps: int) -> dict[str, Any]:
    """Points over plain CLIP of each rule, and by image."""
    rows, W, T = one.rows, one.own.classes, one.own.temperature
    plain = (one.images @ W.T).argmax(-1)
    fits = {name: rule(rows, W, T) for name, rule in rules.items()}
    answers = {name: scores(one.images).argmax(-1) for name, scores in fits.items()}
    evidence = evidence_of(rows, W, T)
    method = evidence["recommended"]
    if method == "none" or method in answers:
        known = {"none": plain, **answers}
        evidence["with labels"] = with_labels(one, method, fits)
        answers["recommended"] = known[method]
        answers[f"recommended, {LABELLED} labels"] = known[evidence["with labels"]]
    if sae_steps:
        answers |= steered(one, sae_steps)
    right = plain == one.labels
    return {
        "evidence": evidence,
        "plain": 100 * right.double().mean().item(),
        "changes": {name: (found == one.labels).double() - right.double() for name, found in answers.items()},
    }


def pooled(draws: list[tuple[Scenario, torch.Tensor]]) -> dict[str, float]:
    """Mean gain over draws, the worst draw, and a normal 95 % interval of the mean over the images that were scored:
    an image that several draws score counts once, however often it was seen."""
    gains = [100 * change.mean().item() for _, change in draws]
    size = max(len(one.own.embeds) for one, _ in draws)
    total, weight = torch.zeros(size, dtype=torch.double), torch.zeros(size, dtype=torch.double)
    for one, change in draws:
        share = torch.full_like(change, 1 / (len(change) * len(draws)))
        weight.index_add_(0, one.scored, share)
        total.index_add_(0, one.scored, share * change)
    mean = total.sum()
    error = 100 * (total - weight * mean).square().sum().sqrt().item()
    gain = sum(gains) / len(gains)
    return {
        "gain": gain,
        "low": gain - 1.96 * error,
        "high": gain + 1.96 * error,
        "worst": min(gains),
        "images": int((weight > 0).sum()),
    }


def scored(
    images: list[ImageSet], seeds: int, chosen: list[str], rules: dict[str, Rule], sae_steps: int
) -> Iterator[dict[str, Any]]:
    for one in images:
        kinds: dict[str, list[Scenario]] = {}
        for scenario in scenarios_of(one, [other for other in images if other.encoder == one.encoder], seeds):
            asked = not chosen or any(scenario.kind.startswith(word) for word in chosen)
            if asked and min(len(scenario.fit), len(scenario.scored)) >= LEAST_ROWS:
                kinds.setdefault(scenario.kind, []).append(scenario)
        for kind, draws in kinds.items():
            found = [measure(draw, rules, sae_steps) for draw in draws]
            yield {
                "set": one.name,
                "encoder": one.encoder,
                "kind": kind,
                "draws": len(draws),
                "labels": len(draws[0].own.classes),
                "rows": sum(len(draw.fit) for draw in draws) / len(draws),
                "plain": sum(each["plain"] for each in found) / len(found),
                "rules": {
                    name: pooled([(draw, each["changes"][name]) for draw, each in zip(draws, found, strict=True)])
                    for name in found[0]["changes"]
                },
                "each": [
                    {
                        "evidence": each["evidence"],
                        "gains": {name: 100 * change.mean().item() for name, change in each["changes"].items()},
                    }
                    for each in found
                ],
            }


def rounded(figures: Any) -> Any:
    """Three digits after the point: a thousandth of a point is more than anybody reads."""
    if isinstance(figures, dict):
        return {name: rounded(value) for name, value in figures.items()}
    return (
        [rounded(one) for one in figures]
        if isinstance(figures, list)
        else (round(figures, 3) if isinstance(figures, float) else figures)
    )


def row_of(result: dict[str, Any]) -> str:
    """A row of the table: gain, interval, worst draw; `!` where a rule is surely below plain CLIP."""
    fields = []
    for found in result["rules"].values():
        sure = "!" if found["high"] < 0 else ""
        fields.append(
            f"{found['gain']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}] ({found['worst']:+.1f}){sure}"
        )
    start = f"| {result['set']} | {result['kind']} | {result['draws']} | {result['plain']:.1f} |"
    return f"{start} {' | '.join(fields)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", type=Path, nargs="+", default=[], help="Files, or folders of such files.")
    parser.add_argument("--temperature", type=float, default=100.0, help="exp(logit_scale), of --embeddings.")
    parser.add_argument("--rows", nargs="+", default=[], metavar="TEST[+MORE]", help="CLS rows, of --clip.")
    parser.add_argument("--clip", help="Hub id or path, of --rows.")
    parser.add_argument("--study", type=Path, help="A study's YAML: its encoders and data sets.")
    parser.add_argument("--output_dir", help="Of the study, where it is not the file's own.")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="ROWS", help="Score no image that is in these --rows."
    )
    parser.add_argument("--half", type=int, choices=(0, 1), help="Score one half of the images alone.")
    parser.add_argument("--kinds", nargs="+", default=[], help="Only kinds of draws that begin so; all by default.")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES))
    parser.add_argument(
        "--sae_steps",
        type=int,
        default=0,
        help="Train an SAE on each draw: VS2 and its controls at CLS, or VS2 in --embeddings.",
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    images = embedding_sets(args.embeddings, args.temperature)
    if args.rows:
        images += row_sets(args.rows, args.clip, args.without)
    if args.study:
        images += study_sets(args.study, args.output_dir)
    if args.half is not None:
        images = [one.half(args.half) for one in images]
    results = []
    rules = {name: RULES[name] for name in args.rules}
    for result in scored(images, args.seeds, args.kinds, rules, args.sae_steps):
        if not results:
            names = list(result["rules"])
            print(
                "| set | images | draws | plain |", " | ".join(names), "|\n|---|---|---:|---:|" + "---:|" * len(names)
            )
        results.append(result)
        print(row_of(result), flush=True)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rounded(results)) + "\n", encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
