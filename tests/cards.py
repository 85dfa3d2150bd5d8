"""Results of a comparison as model cards show them."""

import itertools
import json

from hub_models import LABELS, make_sae

from hf_vs2.files.report import EvaluationResult


TRAINING_DATA = {
    "id": "someone/pictures",
    "split": "train[:600]",
    "fingerprint": "0f1e2d",
    "num_rows": 600,
    "seed": 42,
}
TRAINING_METRICS = {
    "fvu": 0.2812,
    "l0": 7.96,
    "dead_share": 0.015,
    "steps": 1500,
    "train_rows": 480,
    "held_out_rows": 120,
}


def make_result(**meta):
    """Three classes, two prompt sets; the steered model gains in the first class and loses in the last."""
    rows, accuracy = [], []
    for prompts, method in itertools.product(("single", "ensemble"), ("clip", "centroid", "vs2", "vs2+gate")):
        gain = {"clip": 0.0, "centroid": 3.0, "vs2": 4.0, "vs2+gate": 3.5}[method]
        row = {"method": method, "prompts": prompts, "top1": 60 + gain, "top5": None, "gain": gain, "n": 300}
        row |= {"gain_ci": [gain - 1, gain + 1], "coverage": 0.9825, "mean_fvu": 0.31, "seconds": 0.1}
        rows.append(row | {"gamma": 1.5, "lambda": 2.1, "tau": 0.43 if method == "vs2+gate" else None})
        accuracy.append([50.0 + 10 * gain, 60.0, 70.0 - 5 * gain])
    facts = {
        "dataset": {"id": "someone/pictures", "split": "test"},
        "templates": {"single": ["a photo of a {}."], "ensemble": ["a {}.", "one {} | two"]},
        "sae": {"num_latents": 384, "top_k": 8, "activation": "relu"},
        "sae_training_data": TRAINING_DATA,
    }
    per_class = {"class_names": [*LABELS[:2], "a | <b>"], "support": [100, 100, 100], "accuracy": accuracy}
    return EvaluationResult(rows, facts | meta, per_class)


def make_described_sae(clip):
    """With what a card tells of its training."""
    facts = {"training_data": TRAINING_DATA, "training_metrics": TRAINING_METRICS, "num_calibration_rows": 120}
    return make_sae(clip, **facts)


def save_with_log(sae, folder):
    sae.save_pretrained(folder)
    log = {"args": {"learning_rate": 5e-4, "per_device_train_batch_size": 512, "output_dir": str(folder)}}
    (folder / "training_log.json").write_text(json.dumps(log))
    return folder
