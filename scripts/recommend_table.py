"""How often `hf-vs2 recommend` is right, and what it costs when it is not: `python scripts/recommend_table.py`, after the study.

The label-free rule of `hf_vs2.recommendation` is given unlabelled images of three data sets and of shifts made from them, and its choice is scored on test
images of the same kind. Everything is fitted to the unlabelled images; VS2's SAE is the study's (seed 0), trained on evenly spread images,
which favours it. `--half dev` is what the rule's constants were chosen on; without it: the held-out half of each test set.
Writes every scenario as JSON, prints Markdown.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Image as ImageFeature
from draws import drawn, shares_with
from PIL import Image, ImageFilter
from torch.nn.functional import normalize

from hf_vs2 import SAEModel, VS2CLIPForZeroShot, extract_activations
from hf_vs2.encoders.tail import clip_embeds
from hf_vs2.evaluation.recommendation import decide, gather_evidence, recommend
from hf_vs2.functional.label_free import balanced_mean, fit_balanced_prototypes, fit_prototypes, label_scores, norm_fit
from hf_vs2.study import StudyConfig
from hf_vs2.study.bench import Bench, SAESpec


ROWS, DRAWN = 4096, 1000
POLICIES = (
    "none",
    "vs2",
    "distribution_norm",
    "prototypes",
    "balanced_norm",
    "balanced_prototypes",
    "recommended",
    "oracle",
)
CLOSE = 1.0
"""Points below the best candidate that still count as right."""


class Scenario(NamedTuple):
    """Unlabelled rows, test rows and the numbers of the labels that are asked for."""

    kind: str
    rows: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    asked: torch.Tensor


def scenarios(
    train: tuple[torch.Tensor, torch.Tensor], test: tuple[torch.Tensor, torch.Tensor], seed: int
) -> Iterator[Scenario]:
    generator = torch.Generator().manual_seed(seed)
    (rows, row_labels), (images, labels) = train, test
    num_classes = int(row_labels.max()) + 1
    everything = torch.arange(num_classes)

    def some(number: int) -> torch.Tensor:
        return rows[torch.randperm(len(rows), generator=generator)[:number]]

    def uneven(kind: str, wanted: torch.Tensor) -> Scenario:
        chosen = drawn(labels, wanted, DRAWN, generator)
        return Scenario(
            kind, rows[drawn(row_labels, wanted, ROWS, generator)], images[chosen], labels[chosen], everything
        )

    yield Scenario("even", some(ROWS), images, labels, everything)
    for number in (100, 300, 1000):
        yield Scenario("few images", some(number), images, labels, everything)
    for share in (0.3, 0.5, 0.8, 0.95):
        for _ in range(4):
            common = int(torch.randint(num_classes, (1,), generator=generator))
            yield uneven(f"{share:.0%} of one label", shares_with(num_classes, share, common))
    for _ in range(4):
        wanted = 1 / torch.arange(1, num_classes + 1)[torch.randperm(num_classes, generator=generator)]
        yield uneven("long tail", wanted / wanted.sum())
    for share in (0.5, 0.5, 0.2, 0.2):
        present = torch.randperm(num_classes, generator=generator)[: max(2, round(share * num_classes))]
        yield uneven(
            "labels absent from the images", torch.zeros(num_classes).index_fill(0, present, 1 / len(present))
        )
    for share in (0.5, 0.5, 0.25, 0.25):
        asked = torch.randperm(num_classes, generator=generator)[: max(2, round(share * num_classes))].sort().values
        inside = torch.isin(labels, asked)
        yield Scenario("images outside the labels", some(ROWS), images[inside], labels[inside], asked)


def blurred(image: Image.Image, number: int) -> Image.Image:
    return image.convert("RGB").filter(ImageFilter.GaussianBlur(image.width / 40))


def noisy(image: Image.Image, number: int) -> Image.Image:
    pixels = np.asarray(image.convert("RGB")).astype(float)
    noise = np.random.default_rng(number).normal(0, 35, pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype("uint8"))


def shifted(bench: Bench, encoder: str, dataset: str, folder: Path, half: int) -> Iterator[Scenario]:
    """Blur and noise, on 1,000 images of each split at most; extracted once."""
    info, clip = bench.config.dataset(dataset), bench.encoder(encoder).clip
    for kind, change in (("blur", blurred), ("noise", noisy)):
        found = []
        for split in ("train", "test"):
            images = bench.images(dataset, split).cast_column(info.image_column, ImageFeature())
            chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))[:1000].sort().values
            column = info.image_column
            changed = images.select(chosen.tolist()).map(
                lambda row, number, column=column, change=change: {column: change(row[column], number)},
                with_indices=True,
            )
            store = extract_activations(
                clip, changed, folder, image_column=column, label_column=info.label_column, progress=False
            )
            found.append((store.tensor(-1), store.labels))
        (rows, _), (images, labels) = found
        ours = torch.arange(len(images)) % 2 == half
        yield Scenario(kind, rows, images[ours], labels[ours], torch.arange(len(bench.class_names(dataset))))


def followed(model: VS2CLIPForZeroShot, one: Scenario, classes: torch.Tensor) -> tuple[Scenario, str]:
    """What the rule says to a user whose checkpoint is for images of before the shift: the rows that it is about, and
    its method."""
    found, known = recommend(model, one.rows, classes), model.domain_statistics
    assert known is not None and known.rows is not None
    return one._replace(rows=one.rows if found.calibrate_first else known.rows.float()), found.by_rule


@torch.no_grad()
def measure(model: VS2CLIPForZeroShot, one: Scenario, classes: torch.Tensor) -> dict[str, Any]:
    classes, labels = classes[one.asked], torch.searchsorted(one.asked, one.labels)
    embeds, images = (normalize(clip_embeds(model.clip, part), dim=-1) for part in (one.rows, one.images))
    steered = normalize(model.image_features_from_cls(one.images).features, dim=-1)
    fits = {
        "distribution_norm": norm_fit(classes, embeds.mean(0)),
        "prototypes": fit_prototypes(embeds, classes, embeds.mean(0)),
        "balanced_norm": norm_fit(classes, balanced_mean(embeds, classes)),
        "balanced_prototypes": fit_balanced_prototypes(embeds, classes),
    }
    scores = {"none": images @ classes.T, "vs2": steered @ classes.T}
    scores |= {name: label_scores(images, fit) for name, fit in fits.items()}
    accuracy = {name: 100 * (part.argmax(-1) == labels).double().mean().item() for name, part in scores.items()}
    evidence = gather_evidence(embeds, classes, model.clip.logit_scale.exp().item())
    accuracy["recommended"] = accuracy[decide(evidence)[0]]
    accuracy["oracle"] = max(accuracy.values())
    return {
        "kind": one.kind,
        "choice": decide(evidence)[0],
        "accuracy": accuracy,
        "evidence": vars(evidence),
    }


def summary(found: list[dict[str, Any]]) -> str:
    """Mean gain over plain CLIP, the worst one, and for the recommendation how often it is right."""
    fields = []
    for policy in POLICIES[1:]:
        gains = [one["accuracy"][policy] - one["accuracy"]["none"] for one in found]
        fields.append(f"{sum(gains) / len(gains):+.1f} ({min(gains):+.1f})")
    regrets = [one["accuracy"]["oracle"] - one["accuracy"]["recommended"] for one in found]
    right = sum(regret <= CLOSE for regret in regrets) / len(regrets)
    return " | ".join([*fields, f"{right:.0%}", f"{sum(regrets) / len(regrets):.1f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", type=Path, default=Path("examples/studies/vit_tiny_lit.yaml"))
    parser.add_argument("--output_dir", help="Of the study, where it is not the file's own.")
    parser.add_argument("--half", choices=("dev", "held-out"), default="held-out")
    parser.add_argument("--output", type=Path, default=Path("examples/results/recommend/results.json"))
    args = parser.parse_args()
    config = StudyConfig.from_yaml(args.study, args.output_dir)
    bench, encoder = Bench(config, progress=False), config.encoders[0].name
    half = int(args.half == "held-out")
    results: list[dict[str, Any]] = []
    for info in config.datasets:
        spec = SAESpec((info.name,), config.seeds[0], config.sae.top_k, config.sae.expansion_factor)
        sae: SAEModel = bench.sae(encoder, spec)
        model = VS2CLIPForZeroShot(bench.encoder(encoder).clip, sae).eval()
        sets = [
            (bench.rows(encoder, info.name, part).tensor(-1), bench.labels(encoder, info.name, part))
            for part in ("train", "test")
        ]
        order = torch.randperm(len(sets[1][0]), generator=torch.Generator().manual_seed(0))
        ours = order[len(order) // 2 :] if half else order[: len(order) // 2]
        test = sets[1][0][ours], sets[1][1][ours]
        classes = bench.class_matrix(encoder, info.name, "single")
        results += [
            {"dataset": info.name} | measure(model, one, classes) for one in scenarios(sets[0], test, 5 + half)
        ]
        # A shift meets a checkpoint for sharp images: everything that `recommend` does counts.
        model.set_domain_statistics(bench.statistics(encoder, info.name, spec, ROWS))
        for one in shifted(bench, encoder, info.name, Path(config.output_dir) / "shifted", half):
            asked, answer = followed(model, one, classes)
            found = measure(model, asked, classes)
            assert found["choice"] == answer, (found["choice"], answer)
            results.append({"dataset": info.name} | found)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("| images | n |", " | ".join(POLICIES[1:]), "| right | regret |\n|---|---:|" + "---:|" * (len(POLICIES) + 1))
    kinds = dict.fromkeys(one["kind"] for one in results)
    for kind in kinds:
        found = [one for one in results if one["kind"] == kind]
        print(f"| {kind} | {len(found)} |", summary(found), "|")
    for info in config.datasets:
        found = [one for one in results if one["dataset"] == info.name]
        print(f"| **{info.name}** | {len(found)} |", summary(found), "|")
    print(f"| **all** | {len(results)} |", summary(results), "|")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
