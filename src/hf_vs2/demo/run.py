"""The whole way in a minute, offline: a tiny CLIP that knows printed characters meets real handwriting, without
labels.

Extract, train, calibrate, compare, draw: each step is the public function that a user would call. Every figure is
measured when the demo runs, on images that the SAE in use has not seen (three folds, one SAE each).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..clip.modeling import VS2CLIPForZeroShot
from ..config.sae import SAEConfig
from ..data.stores.activations import ActivationStore, extract_activations
from ..encoders.loading import load_clip
from ..encoders.processing import load_processing
from ..evaluation.comparison import EvaluationResult, evaluate
from ..files.progress import without_loading_bars
from ..sae.modeling import SAEModel
from ..training.arguments import SAETrainingArguments
from ..training.trainer import SAETrainer
from .data import DIGIT_NAMES, foreign_images, load_handwriting, require_demo_packages
from .folds import outcomes, pool_folds
from .result import NUM_FOLDS, DemoResult, ForeignSet


if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

TARGET = "handwritten digits"
NUM_FOREIGN = 300
MAX_STEPS = 600
# Not the default 0.99: printed letters are so close to handwriting that the stricter gate shows better what it does.
GATE = 0.95


def run_demo(
    output_dir: str | Path, *, seed: int = 0, num_threads: int | None = None, progress: bool = True
) -> DemoResult:
    """
    Run the demo: about a minute on one CPU core, no network.

    Args:
        output_dir: where everything goes: `demo.png`, `results.json`, `sae/`, `model/`, `activations/`. Activations
            found there are used again.
        seed: of the folds, the SAEs and the foreign images.
        num_threads: CPU threads of torch while it runs; 1 by default, because for models this small more threads only
            wait for each other (on a busy machine by a factor of five).
        progress: show progress bars.

    Raises:
        ImportError: scikit-learn or matplotlib is missing.
    """
    require_demo_packages()
    from .figure import draw_demo  # which needs matplotlib

    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with _threads(num_threads or 1), without_loading_bars():
        result = _Demo(output_dir, seed, progress).run()
    draw_demo(result, load_handwriting()["image"][:], result.figure_path)
    result.seconds = time.perf_counter() - started
    result.evaluation.meta["seconds"] = round(result.seconds, 1)
    result.evaluation.to_json(result.results_path)
    return result


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Demo:
    """The steps of one run, on the shipped CLIP."""

    def __init__(self, output_dir: Path, seed: int, progress: bool):
        assets = str(files("hf_vs2") / "demo_assets")
        self.output_dir, self.seed, self.progress = output_dir, seed, progress
        # Stored in float16 to be small; computed in float32, which is what CPUs are good at.
        self.clip = load_clip(assets, dtype=torch.float32)
        self.tokenizer, self.image_processor = load_processing(assets)

    def run(self) -> DemoResult:
        handwriting = load_handwriting()
        store = self._extract(handwriting, TARGET, label_column="label")
        foreign = {
            name: self._extract(_dataset(images), name).tensor()
            for name, images in foreign_images(NUM_FOREIGN, self.seed).items()
        }
        folds = torch.randperm(len(store), generator=torch.Generator().manual_seed(self.seed)).chunk(NUM_FOLDS)
        results, gates = [], []
        for number, fold in enumerate(folds):
            rest = torch.cat([other for other in folds if other is not fold])
            model = self._steered(self._train(store.take(rest), f"folds/{number}", self.seed + number))
            results.append(self._compare(model, store, fold, rest))
            images = foreign | {TARGET: store.take(fold)}
            gates.append({name: _relative_fvu(model, rows) for name, rows in images.items()})
        evaluation = pool_folds(results, folds)
        relative_fvu = torch.cat([gate[TARGET] for gate in gates])[torch.cat(folds).argsort()]
        sets = [ForeignSet(name, torch.cat([gate[name] for gate in gates])) for name in foreign]
        evaluation.meta |= _facts(evaluation, relative_fvu, sets, results)
        self._save(store, handwriting)
        return DemoResult(self.output_dir, evaluation, relative_fvu, sets, store)

    def _extract(self, dataset: Dataset, name: str, label_column: str | None = None) -> ActivationStore:
        return extract_activations(
            self.clip,
            dataset,
            self.output_dir / "activations",
            image_processor=self.image_processor,
            label_column=label_column,
            progress=self.progress,
            dataset_id=name,
        )

    def _train(self, rows: torch.Tensor | ActivationStore, folder: str, seed: int) -> SAEModel:
        config = SAEConfig(
            hidden_size=self.clip.config.vision_config.hidden_size, expansion_factor=4, top_k=16, gate=GATE
        )
        arguments = SAETrainingArguments(
            output_dir=str(self.output_dir / folder),
            overwrite_output_dir=True,
            learning_rate=1e-3,
            max_steps=MAX_STEPS,
            per_device_train_batch_size=256,
            save_steps=0,
            seed=seed,
            disable_tqdm=not self.progress,
        )
        trainer = SAETrainer(config, arguments, rows)
        trainer.train()
        return trainer.model.to(self.clip.device).eval()

    def _steered(self, sae: SAEModel) -> VS2CLIPForZeroShot:
        return VS2CLIPForZeroShot(
            self.clip, sae, gamma=sae.config.gamma, lambda_=sae.config.lambda_, gate=sae.config.gate
        )

    def _compare(
        self, model: VS2CLIPForZeroShot, store: ActivationStore, fold: torch.Tensor, rest: torch.Tensor
    ) -> EvaluationResult:
        labels = store.labels
        assert labels is not None
        return evaluate(
            model,
            store.take(fold),
            labels[fold],
            DIGIT_NAMES,
            self.tokenizer,
            reference_rows=store.take(rest),
            seed=self.seed,
            meta={"dataset": store.metadata["dataset"], "dataset_id": store.metadata["dataset_id"]},
        )

    def _save(self, store: ActivationStore, handwriting: Dataset) -> None:
        """What the user goes on with: an SAE trained on all digits, a steered CLIP that needs nothing else, one
        image."""
        model = self._steered(self._train(store, "sae", self.seed))
        model.save_pretrained(self.output_dir / "model", full=True)
        # Saved by name, because save_pretrained leaves such files alone where there are some, from an older demo
        # perhaps.
        self.tokenizer.save_pretrained(self.output_dir / "model")
        self.image_processor.save_pretrained(self.output_dir / "model")
        handwriting[0]["image"].save(self.output_dir / "digit.png")


def _dataset(images: Sequence[Image.Image]) -> Dataset:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    return Dataset.from_dict({"image": list(images)}, features=Features({"image": ImageFeature()}))


@torch.no_grad()
def _relative_fvu(model: VS2CLIPForZeroShot, rows: torch.Tensor) -> torch.Tensor:
    """Per-sample FVU over the gate's threshold, `(n,)`."""
    fvu = model.steer_cls(rows).fvu
    assert fvu is not None  # VS2 reads the SAE
    return fvu / model.sae.fvu_threshold(GATE)


def _facts(
    evaluation: EvaluationResult,
    relative_fvu: torch.Tensor,
    sets: Sequence[ForeignSet],
    results: Sequence[EvaluationResult],
) -> dict[str, Any]:
    """What the demo adds to the result file."""
    labels, samples = outcomes(evaluation)
    right = (samples[evaluation.index("clip")].predictions == labels).double()
    low = relative_fvu <= relative_fvu.median()
    return {
        "folds": [{"n": result.meta["n"], "tau": result.row("vs2+gate")["tau"]} for result in results],
        "foreign": [{"name": one.name, "n": NUM_FOREIGN, "coverage": one.coverage} for one in sets],
        "plain_accuracy_by_fvu": {
            "lower half": 100 * right[low].mean().item(),
            "upper half": 100 * right[~low].mean().item(),
        },
    }
