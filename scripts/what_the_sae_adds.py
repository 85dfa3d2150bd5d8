#!/usr/bin/env python
"""What does the SAE add? One rule at a time with an SAE, with a random dictionary, with PCA and with no dictionary.

    python scripts/what_the_sae_adds.py --search    # development halves: every SAE and rule that was tried
    python scripts/what_the_sae_adds.py             # held-out halves: the finalists and all their controls, once

Rows and SAEs are those of a study's folder; what is missing there is made. Test rows are split once, at random, into halves;
statistics and prototypes come from unlabelled training rows alone. docs/what-the-sae-adds.md tells what came out."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.functional import normalize
from transformers.utils import logging

from hf_vs2 import SAEConfig, SAEModel, SAETrainer, SAETrainingArguments
from hf_vs2.functional import fvu_per_sample, keep_norm, label_free
from hf_vs2.sae.modeling import SAEOutput
from hf_vs2.study.bench import Bench, SAESpec
from hf_vs2.study.config import StudyConfig


RESULTS = Path("examples/results/what-the-sae-adds")
ALPHA = 1.05  # lambda (gamma - 1) of the paper's 2.1 and 1.5
SAMPLE = 4096  # training rows that statistics and prototypes are taken from
SEEDED = ("sae", "random")


@dataclass(frozen=True)
class Recipe:
    """How an SAE is trained: `kind` is topk, batch (batch top-k) or matryoshka; `union`: on the rows of all data sets."""

    top_k: int = 16
    expansion: int = 4
    steps: int = 1500
    kind: str = "topk"
    union: bool = False
    learning_rate: float = 5e-4

    @property
    def name(self) -> str:
        words = [self.kind, f"k{self.top_k}", f"x{self.expansion}", f"{self.steps} steps"] + ["union"] * self.union
        return " ".join(words + [f"lr {self.learning_rate:g}"] * (self.learning_rate != 5e-4))


class VariantSAE(SAEModel):
    """Batch top-k (arXiv 2412.06410) or Matryoshka (arXiv 2503.17547), trained by the library's trainer. Codes are dense here."""

    kind = "batch"

    def forward(self, x: torch.Tensor, dead_latents: torch.Tensor | None = None, **_: Any) -> SAEOutput:
        """As [`SAEModel.forward`]; a Matryoshka's loss is the mean over the first 1/16, 1/8, 1/4, 1/2 and all latents."""
        before = F.linear(x - self.b_pre, self.W_enc, self.b_enc)
        strength, k = before.detach(), self.config.top_k
        batchwise = self.kind == "batch"
        cut = strength.flatten().topk(k * len(x)).values[-1] if batchwise else strength.topk(k).values[:, -1:]
        z = torch.relu(before) * (strength >= cut)
        ends = [z.shape[1] // part for part in ((1,) if batchwise else (16, 8, 4, 2, 1))]
        reconstruction, errors, start = self.b_pre.expand(len(x), -1), [], 0
        for end in ends:
            reconstruction = reconstruction + z[:, start:end] @ self.W_dec[start:end]
            errors.append((x - reconstruction).square().sum(-1).mean())
            start = end
        loss, scale = torch.stack(errors).mean(), self.config.total_variance or 1.0
        if dead_latents is not None:
            revived = self._aux_k_loss(x, strength, (x - reconstruction).detach(), dead_latents)
            loss = loss + self.config.aux_k_coefficient * revived
        values, indices = z.topk(min(4 * k, z.shape[1]), dim=-1)
        return SAEOutput(
            loss / scale, reconstruction, values, indices, fvu_per_sample(x, reconstruction.detach(), self.mean)
        )


class World:
    """The study's encoder, rows and SAEs."""

    def __init__(self, config: Path, study: Path, prompts: str):
        self.study, self.prompts, self.bench = study, prompts, Bench(StudyConfig.from_yaml(config, str(study)))
        self.encoder = self.bench.config.encoders[0].name
        self.names = [one.name for one in self.bench.config.datasets]
        self.table = lambda figures: dict(zip([*self.names, "mean"], figures, strict=True))
        self.task = lru_cache(None)(self._task)
        self.codes = lru_cache(maxsize=9)(self._codes)
        self.right = lru_cache(None)(self._right)

    def _task(self, name: str) -> Task:
        bench, encoder = self.bench, self.encoder
        train, test = (bench.rows(encoder, name, split).tensor(-1) for split in ("train", "test"))
        labels, classes = bench.labels(encoder, name), bench.class_matrix(encoder, name, self.prompts)
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
        sample = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:SAMPLE]
        halves = {"dev": order[: len(test) // 2], "held_out": order[len(test) // 2 :]}
        return Task(train, train.mean(0), train[sample], test, labels, classes, halves, partial(bench.embed, encoder))

    def sae(self, name: str, recipe: Recipe, seed: int) -> SAEModel:
        """The SAE, trained now unless it is there."""
        if replace(recipe, top_k=16, expansion=4) == Recipe():  # the study's own settings
            return self.bench.sae(self.encoder, SAESpec((name,), seed, recipe.top_k, recipe.expansion))
        where = "union" if recipe.union else name
        folder = self.study / "what-the-sae-adds" / f"{where}-{recipe.name.replace(' ', '-')}-seed{seed}"
        kind = SAEModel if recipe.kind == "topk" else VariantSAE
        if not (folder / "training_log.json").is_file():
            torch.manual_seed(seed)
            width = self.task(name).train.shape[1]
            model = kind(SAEConfig(hidden_size=width, expansion_factor=recipe.expansion, top_k=recipe.top_k))
            if isinstance(model, VariantSAE):
                model.kind = recipe.kind
            args = SAETrainingArguments(str(folder), recipe.learning_rate, max_steps=recipe.steps, seed=seed)
            args.save_steps, args.disable_tqdm = 0, True
            stores = [self.bench.rows(self.encoder, one, "train") for one in (self.names if recipe.union else [name])]
            with torch.enable_grad():
                SAETrainer(model, args, stores).train()
        return kind.from_pretrained(folder).eval()

    def _codes(self, source: str, recipe: Recipe, seed: int, name: str) -> Codes:
        task = self.task(name)
        if source == "sae":
            return sae_codes(self.sae(name, recipe, seed), recipe, task)
        if source == "random":
            return random_codes(recipe, seed, task)
        if source == "pca":
            return pca_codes(recipe, task)
        return Codes(task.sample[:, :0], task.test[:, :0], task.train[:0], task.mean)

    def _right(self, method: Method, seed: int, name: str) -> np.ndarray:
        codes = self.codes(method.source, method.recipe, seed, name)
        return (scores(method.rule, self.task(name), codes).argmax(-1) == self.task(name).labels).double().numpy()

    def delta(self, one: Method, other: Method, name: str, half: str, seeds: int = 3) -> np.ndarray:
        """How much more often an image of a half is right, each method's mean over its seeds."""
        rows = self.task(name).halves[half].numpy()
        right = [
            [self.right(m, s, name)[rows] for s in range(seeds if m.source in SEEDED else 1)] for m in (one, other)
        ]
        return np.mean(right[0], axis=0) - np.mean(right[1], axis=0)

    def gains(self, method: Method, half: str, seeds: int = 3) -> dict[str, float]:
        """Points over plain CLIP on each data set, and their mean."""
        found = [100 * self.delta(method, Method(Rule()), name, half, seeds).mean() for name in self.names]
        return self.table([round(float(gain), 2) for gain in (*found, np.mean(found))])

    def difference(self, one: Method, other: Method) -> dict[str, list[float]]:
        """Held-out points of one method over another with 95 % intervals: `[difference, low, high]`, also of the mean."""
        deltas = [self.delta(one, other, name, "held_out") for name in self.names]
        points = [100 * delta.mean() for delta in deltas]
        draws = [resampled(delta, seed) for seed, delta in enumerate(deltas)]
        points, draws = [*points, np.mean(points)], [*draws, np.mean(draws, axis=0)]
        rows = [(point, *np.quantile(drawn, [0.025, 0.975])) for point, drawn in zip(points, draws, strict=True)]
        return self.table([[round(float(number), 2) for number in row] for row in rows])


class Task(NamedTuple):
    """A data set: CLS rows `(n, hidden_size)`, the labels of the test rows, and its class matrix."""

    train: torch.Tensor
    mean: torch.Tensor
    sample: torch.Tensor
    test: torch.Tensor
    labels: torch.Tensor
    classes: torch.Tensor
    halves: dict[str, torch.Tensor]
    embed: Callable[[torch.Tensor], torch.Tensor]


class Codes(NamedTuple):
    """Dense codes `(n, num_latents)`; `x~ = z @ decoder + bias`. `views` only where they are not made of the code."""

    sample: torch.Tensor
    test: torch.Tensor
    decoder: torch.Tensor
    bias: torch.Tensor
    views: tuple[torch.Tensor, ...] = ()

    def fvu(self, task: Task) -> float:
        """Of the development rows."""
        x, z = task.test[task.halves["dev"]], self.test[task.halves["dev"]]
        return ((x - z @ self.decoder - self.bias).square().sum() / (x - task.mean).square().sum()).item()


def strongest(before: torch.Tensor, k: int) -> torch.Tensor:
    """ReLU, then the `k` largest of each row; the rest 0."""
    return torch.relu(before) * (before >= before.topk(k, dim=-1).values[:, -1:])


def sae_codes(sae: SAEModel, recipe: Recipe, task: Task) -> Codes:
    """Of a batch top-k SAE with the threshold that leaves `k` latents a row on the sample."""
    sample, test = (F.linear(rows - sae.b_pre, sae.W_enc, sae.b_enc) for rows in (task.sample, task.test))
    if recipe.kind != "batch":
        return Codes(strongest(sample, recipe.top_k), strongest(test, recipe.top_k), sae.W_dec, sae.b_pre)
    cut = sample.flatten().topk(recipe.top_k * len(sample)).values[-1].clamp_min(0)
    return Codes(sample * (sample >= cut), test * (test >= cut), sae.W_dec, sae.b_pre)


def random_codes(recipe: Recipe, seed: int, task: Task) -> Codes:
    """Unit directions at random, encoder the decoder's transpose, one scale fitted on training rows by least squares."""
    generator, width = torch.Generator().manual_seed(1000 + seed), task.train.shape[1]
    decoder = normalize(torch.randn(recipe.expansion * width, width, generator=generator), dim=-1)
    sample, test = (strongest((rows - task.mean) @ decoder.T, recipe.top_k) for rows in (task.sample, task.test))
    made = sample @ decoder
    scale = ((task.sample - task.mean) * made).sum() / made.square().sum()
    return Codes(scale * sample, scale * test, decoder, task.mean)


def pca_codes(recipe: Recipe, task: Task) -> Codes:
    """The `k` components of largest absolute value; as a view, all of them, whitened."""
    centre = (task.train - task.mean).double()
    variances, vectors = torch.linalg.eigh(centre.T @ centre / len(centre))
    statistics, codes = label_free.RowStatistics(task.mean, vectors.T.float(), variances.clamp_min(0).float()), []
    for rows in (task.sample, task.test):
        found = (rows - task.mean) @ statistics.components.T
        codes.append(found * (found.abs() >= found.abs().topk(recipe.top_k, dim=-1).values[:, -1:]))
    views = tuple(label_free.pca_view(rows, statistics) for rows in (task.sample, task.test))
    return Codes(codes[0], codes[1], statistics.components, task.mean, views)


class Rule(NamedTuple):
    """Rows are moved ([`moved`]) by `amount`, then scored: plain, dn, or km with the `view` of [`latent_view`]."""

    move: str = "none"
    amount: float = 0.0
    score: str = "plain"
    view: str = "none"
    weight: float = 2.0
    keep: int = 0  # latents that stay in a class's view prototype; 0 for all
    beside_pca: bool = False  # the whitened PCA view as well

    @property
    def name(self) -> str:
        words = [f"{self.move} {self.amount:g}"] * (self.move != "none") + [self.score]
        words += [f"{self.view} view {self.weight:g}"] * (self.view != "none") + [f"top {self.keep}"] * bool(self.keep)
        return " + ".join(words + ["pca view"] * self.beside_pca)


def moved(rule: Rule, task: Task, codes: Codes) -> Iterator[torch.Tensor]:
    """The sample and the test rows after the move."""
    chosen = specific_latents(task, codes.sample) if rule.move == "specific" else 1
    for x, z in ((task.sample, codes.sample), (task.test, codes.test)):
        away, made, decoder = x - task.mean, z @ codes.decoder, codes.decoder
        steps = {"centroid": away, "vs2": made, "denoise": made + codes.bias - x, "specific": z * chosen @ decoder}
        steps |= {"none": 0 * x, "corrected": away + (made - codes.sample.mean(0) @ decoder) / 2}
        yield keep_norm(x + rule.amount * steps[rule.move], x)


def specific_latents(task: Task, sample: torch.Tensor) -> torch.Tensor:
    """1 for the half of the latents whose activity is the least spread over pseudo-labels (of distribution norm), else 0."""
    embeds = task.embed(task.sample)
    pseudo = label_free.label_scores(embeds, label_free.norm_fit(task.classes, embeds.mean(0)))
    entropy = torch.special.entr(normalize(sample.abs().T @ (100 * pseudo).softmax(-1), p=1, dim=-1)).sum(-1)
    return (entropy <= entropy.median()).float()


def latent_view(kind: str, task: Task, codes: Codes) -> list[torch.Tensor]:
    """Of the sample and of the test rows. `idf` is the library's [`latent_view`]; the others change one thing of it."""
    if codes.views:
        return list(codes.views)
    change = {"sqrt": torch.sqrt, "binary": torch.sign}.get(kind, lambda z: z)
    idf = -(((codes.sample != 0).sum(0) + 1) / (len(codes.sample) + 1)).log()
    mean = change(codes.sample).mean(0)
    views = [normalize((change(z) - mean) * idf, dim=-1) for z in (codes.sample, codes.test)]
    if kind == "gated":  # a row counts less, the less of it the code explains
        pairs = ((task.sample, codes.sample), (task.test, codes.test))
        trust = [1 - fvu_per_sample(x, z @ codes.decoder + codes.bias, task.mean).clamp(0, 1) for x, z in pairs]
        views = [v * (t / trust[0].mean()).unsqueeze(-1) for v, t in zip(views, trust, strict=True)]
    return views


def scores(rule: Rule, task: Task, codes: Codes) -> torch.Tensor:
    """Class scores of the test rows, `(n, num_classes)`."""
    embeds = [task.embed(rows) for rows in moved(rule, task, codes)]
    mean, views = embeds[0].mean(0), []
    if rule.score == "plain":
        return embeds[1] @ task.classes.T
    if rule.score == "dn":
        return label_free.label_scores(embeds[1], label_free.norm_fit(task.classes, mean))
    if rule.beside_pca:
        views.append(pca_codes(Recipe(), task).views)
    if rule.view != "none":
        views.append(tuple(rule.weight / 2 * view for view in latent_view(rule.view, task, codes)))
    fit = label_free.fit_prototypes(embeds[0], task.classes, mean, [view for view, _ in views])
    if rule.keep:
        least = fit.views[-1].topk(rule.keep, dim=-1).values[:, -1:]
        fit = fit._replace(views=(*fit.views[:-1], normalize(fit.views[-1] * (fit.views[-1] >= least), dim=-1)))
    return label_free.label_scores(embeds[1], fit, [view for _, view in views])


class Method(NamedTuple):
    """A rule with a dictionary: `source` is sae, random, pca or none."""

    rule: Rule
    source: str = "none"
    recipe: Recipe = Recipe()

    @property
    def name(self) -> str:
        k = f"k{self.recipe.top_k}"
        made = {"sae": f", SAE {self.recipe.name}", "random": f", random {k}", "pca": f", PCA {k}", "none": ""}
        return self.rule.name + made[self.source]


def controls(rule: Rule, recipe: Recipe) -> list[Method]:
    """The same rule with a random dictionary and PCA, and what is left of it without a dictionary."""
    bare = rule._replace(view="none", weight=2.0, keep=0, move="none", amount=0.0)
    left = [bare, bare._replace(move="centroid", amount=ALPHA), bare._replace(move="centroid", amount=2.0)]
    return [Method(rule, "random", recipe), Method(rule, "pca", recipe), *map(Method, left)]


def resampled(delta: np.ndarray, seed: int, num_resamples: int = 10_000) -> np.ndarray:
    """Means in points of paired bootstrap resamples over images. As `hf_vs2.evaluation.comparison.paired_bootstrap`, which knows differences
    of -1, 0 and 1; these are means over SAE seeds, so there are a few values more."""
    values, counts = np.unique(delta.round(9), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(delta), counts / len(delta), size=num_resamples)
    return 100 * drawn @ values / len(delta)


LONG = Recipe(steps=6000, union=True, learning_rate=2e-3)
NESTED = replace(LONG, kind="matryoshka")
MAIN = (Rule("vs2", ALPHA), Rule("vs2", ALPHA, "dn"), Rule("corrected", 2.0, "dn"), Rule(score="km", view="idf"))
BOTH = MAIN[3]._replace(beside_pca=True)
FINALISTS = [*product(MAIN, (Recipe(), LONG)), (MAIN[0], Recipe(expansion=2)), (MAIN[3], NESTED), (BOTH, LONG)]
FINALISTS += [(Rule("denoise", 0.25, "dn"), Recipe())]
RECIPES = (
    *(Recipe(k) for k in (8, 16, 32, 64, 128)),
    *(Recipe(expansion=2), Recipe(expansion=8), Recipe(steps=6000), Recipe(union=True), Recipe(64, union=True)),
    *(Recipe(k, kind=kind) for kind in ("batch", "matryoshka") for k in (16, 64)),
    *(Recipe(steps=6000, union=True), LONG, NESTED),
)
MORE = (
    *(Rule(score="km", view="idf", weight=weight) for weight in (1.0, 4.0)),
    *(Rule(score="km", view=view) for view in ("sqrt", "binary", "gated")),
    *(Rule(score="km", view="idf", keep=keep) for keep in (8, 32, 128)),
    *(BOTH, *(Rule("denoise", amount, "dn") for amount in (0.25, 0.5, 1.0))),
    *(Rule("specific", ALPHA, score) for score in ("plain", "dn", "km")),
    *(Rule(move, amount, "km") for move, amount in (("vs2", ALPHA), ("corrected", 2.0), ("denoise", 0.5))),
)


def search(world: World) -> Iterator[dict[str, Any]]:
    """Development halves, one SAE seed: gains of each rule with each dictionary."""
    tried = [*product(RECIPES, MAIN), *product((Recipe(), LONG), MORE)]
    for recipe, rule in tried:
        row: dict[str, Any] = {"rule": rule.name, "sae_recipe": recipe.name}
        for source in ("sae", "random", "pca"):
            row[source] = world.gains(Method(rule, source, recipe), "dev", seeds=1)
            codes = [world.codes(source, recipe, 0, name) for name in world.names]
            row[f"fvu_{source}"] = [round(c.fvu(world.task(n)), 3) for c, n in zip(codes, world.names, strict=True)]
        yield row
    for method in dict.fromkeys(one for recipe, rule in tried for one in controls(rule, recipe)[2:]):
        yield {"rule": method.name, "none": world.gains(method, "dev")}


def held_out(world: World) -> Iterator[dict[str, Any]]:
    """The finalists and their controls on the held-out halves. Which control is the best one, the development halves say."""
    everything = [one for rule, recipe in FINALISTS for one in controls(rule, recipe)]
    best_of_all = max(everything, key=lambda one: world.gains(one, "dev")["mean"])
    for rule, recipe in FINALISTS:
        method, others = Method(rule, "sae", recipe), controls(rule, recipe)
        best = max(others, key=lambda one: world.gains(one, "dev")["mean"])
        rows = {one.name: {half: world.gains(one, half) for half in ("dev", "held_out")} for one in [method, *others]}
        over = {one.name: world.difference(method, one) for one in others}
        yield {"method": method.name, "gains": rows, "best_control": best.name, "over": over} | {
            "best_without_sae": best_of_all.name,
            "over_best_without_sae": world.difference(method, best_of_all),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("outputs/studies/vit-tiny-lit"), help="folder of the study")
    parser.add_argument("--config", type=Path, default="examples/studies/vit_tiny_lit.yaml", help="its YAML file")
    parser.add_argument("--search", action="store_true", help="what was tried, on the development halves")
    parser.add_argument("--prompts", default="ensemble", help="single or ensemble")
    parser.add_argument("--output", type=Path, help=f"JSON file; by default in {RESULTS}")
    args = parser.parse_args()
    output = args.output or RESULTS / ("dev.json" if args.search else "results.json")
    logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    world, started, rows = World(args.config, args.study, args.prompts), time.perf_counter(), []
    for row in (search if args.search else held_out)(world):
        print(json.dumps(row), flush=True)
        rows.append(row)
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = f'{{"prompts": "{args.prompts}", "seconds": {time.perf_counter() - started:.0f}, "rows": [\n'
    output.write_text(facts + ",\n".join(map(json.dumps, rows)) + "\n]}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
