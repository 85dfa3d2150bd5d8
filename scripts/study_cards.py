#!/usr/bin/env python
"""Writes the model cards of a study's SAEs of the first seed: one for each data set, and one for the SAE of several data sets.

    python scripts/study_cards.py examples/studies/vit_tiny_lit.yaml --output_dir model_cards

The SAEs are trained with the study's own settings where they are not in its folder (`hf-vs2 study` leaves them there), then evaluated
on the test split: every method, single prompt and ensemble. The SAE of several data sets is evaluated on the first one that it was
not trained on. The cards are the library's own (`hf_vs2.create_model_card`).
"""

import argparse
from pathlib import Path

from transformers.utils import logging

from hf_vs2 import VS2CLIPForZeroShot, create_model_card, evaluate
from hf_vs2.study.bench import Bench, SAESpec
from hf_vs2.study.config import StudyConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="YAML file of the study")
    parser.add_argument("--output_dir", type=Path, default=Path("model_cards"), help="where the cards go")
    parser.add_argument("--study_dir", help="folder of the study, instead of the one in its file")
    args = parser.parse_args()
    logging.disable_progress_bar()
    config = StudyConfig.from_yaml(args.study, output_dir=args.study_dir)
    bench = Bench(config)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for encoder in config.encoders:
        for trained_on, evaluated_on in pairs(config):
            path = write_card(bench, encoder.name, trained_on, evaluated_on, args.output_dir)
            print(path)


def pairs(config: StudyConfig) -> list[tuple[tuple[str, ...], str]]:
    """Data sets to train on, and the one to evaluate on."""
    names = [one.name for one in config.datasets]
    found: list[tuple[tuple[str, ...], str]] = [((name,), name) for name in names]
    if config.gate_shift is not None:
        union = tuple(config.gate_shift.trained_on)
        found += [(union, name) for name in names if name not in union][:1]
    return found


def write_card(bench: Bench, encoder: str, trained_on: tuple[str, ...], evaluated_on: str, output_dir: Path) -> Path:
    settings, steering = bench.config.sae, bench.config.steering
    seed = bench.config.seeds[0]
    spec = SAESpec(trained_on, seed, settings.top_k, settings.expansion_factor)
    folder = bench.train(encoder, spec)
    clip, tokenizer, _ = bench.encoder(encoder)
    model = VS2CLIPForZeroShot(clip, bench.sae(encoder, spec)).eval()
    model.set_steering(gamma=steering.gamma, lambda_=steering.lambda_, gate=steering.gate)
    rows = bench.rows(encoder, evaluated_on, "test")
    names = bench.class_names(evaluated_on)
    if rows.class_names:  # what prompts call the data set's own classes
        names = dict(zip(rows.class_names, names, strict=True))
    reference = bench.rows(encoder, evaluated_on, "train")
    result = evaluate(model, rows, bench.labels(encoder, evaluated_on), names, tokenizer, reference_rows=reference)
    name = f"sae-{encoder}-{'-'.join(trained_on)}-k{spec.top_k}"
    path = output_dir / f"{name}.md"
    path.write_text(str(create_model_card(folder, name=name, results=result)), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
