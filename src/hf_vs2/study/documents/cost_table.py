"""What steering costs, beside the paper's figures: compute, parameters, time and memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..results.cells import CellResult
from . import published
from .markdown import table
from .result_view import ResultView


def cost(view: ResultView) -> Iterator[str]:
    """For each encoder, a table and how its figures were taken."""
    for one in view.result.select("cost", method="cost"):
        yield f"## Cost: {view.heading(one.cell.encoder)}\n\n{_cost_table(view, one)}\n\n{_cost_note(one.figures)}"


def _cost_table(view: ResultView, one: CellResult) -> str:
    figures, theirs = one.figures, published.compute(view.encoder_id(one.cell.encoder))
    flops, sizes, timing = figures["flops"], figures["parameters"], figures["time"]
    training, memory = figures["training"], figures["memory"]
    rows = [
        [
            "GFLOPs an image",
            f"{flops['plain'] / 1e9:.4f}" + (f" [{theirs['clip_gflops']}]" if theirs else ""),
            f"{flops['steered'] / 1e9:.4f}" + (f" [{theirs['vs2_gflops']}]" if theirs else ""),
            f"{flops['added_percent']:+.3f} %"
            + (f" [{100 * (theirs['vs2_gflops'] / theirs['clip_gflops'] - 1):+.3f} %]" if theirs else ""),
        ],
        [
            "parameters, image side (M)",
            f"{sizes['image_side'] / 1e6:.2f}",
            f"{(sizes['image_side'] + sizes['sae']) / 1e6:.2f}",
            f"{sizes['sae'] / 1e6:+.2f}" + (f" [{theirs['sae_parameters'] / 1e6:+.2f}]" if theirs else ""),
        ],
        [
            f"time a call of {figures['batch_size']} (ms)",
            f"{timing['plain_ms']:.2f}",
            f"{timing['steered_ms']:.2f}",
            f"x {timing['ratio']:.3f}, quartiles {timing['ratio_iqr'][0]:.3f} and {timing['ratio_iqr'][1]:.3f}",
        ],
    ]
    if memory is not None:
        rows.append(
            [
                "peak memory (MB)",
                f"{memory['plain'] / 1e6:.1f}",
                f"{memory['steered'] / 1e6:.1f}",
                f"{memory['added'] / 1e6:+.1f} ({memory['added_percent']:+.2f} %)",
            ]
        )
    learned = f"{training['per_sample'] / 1e9:.4f}" + (f" [{theirs['training_gflops']}]" if theirs else "")
    rows.append(["GFLOPs a sample of SAE training, cached rows", "", learned, ""])
    return table(["", "CLIP", "VS2", "added"], rows)


def _cost_note(figures: dict[str, Any]) -> str:
    flops, training, memory = figures["flops"], figures["training"], figures["memory"]
    text = (
        f"On {figures['device']} in {figures['dtype']}, {figures['threads']} threads, {figures['image_size']}-pixel "
        f"images, {figures['num_classes']} cached class embeddings, no gate. FLOPs are counted by torch's counter, a "
        f"multiplication and an addition as two, attention's products ({flops['attention'] / 1e9:.4f} GFLOPs) among "
        f"them; {flops['added_by_formula'] / 1e6:.4f} of the {flops['added'] / 1e6:.4f} MFLOPs that steering adds, "
        f"and {training['added_by_formula'] / 1e6:.4f} MFLOPs of the training, are sparse sums that it does not know, "
        f"added by formula. Training takes {training['dense_encoder'] / 1e9:.4f} GFLOPs if the encoder's product is "
        f"taken three times, once forward and twice backward. Times: median of {figures['time']['pairs']} pairs taken "
        "in turn."
    )
    return text if memory is None else f"{text} Memory: {memory['kind']}."
