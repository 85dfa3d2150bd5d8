"""The pictures of docs/how.md, from the bundled demo: `python docs/figures/how.py [FOLDER OF A DEMO]`.

Without a folder the demo is run in a temporary one (half a minute, offline). Every digit is drawn as the SAE of the fold that did not train
on it sees it.
"""

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from hf_vs2 import SAEModel, VS2CLIPForZeroShot, class_embeddings, plot_grid, steering_grid
from hf_vs2.demo.data import DIGIT_NAMES
from hf_vs2.demo.run import GATE, NUM_FOLDS, run_demo
from hf_vs2.encoders.processing import load_processing
from hf_vs2.evaluation.grid import SteeringGrid
from hf_vs2.files.figure_style import PAGE, STYLES, style
from hf_vs2.files.markdown import percent
from hf_vs2.functional import steering_vector


IMAGES = Path(__file__).parents[1] / "images"
BLUE, RED, GREEN, PINK, GREY = *(colour for colour, _ in STYLES), "#777777"
SEED = 0


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        demo = run_demo(folder, seed=SEED, progress=False)
        rows, labels = demo.store.tensor(), demo.store.labels
        folds = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED)).chunk(NUM_FOLDS)
        saes = [SAEModel.from_pretrained(folder / "folds" / str(number)).eval() for number in range(NUM_FOLDS)]
        clip_files = VS2CLIPForZeroShot.from_pretrained(folder / "model")
        IMAGES.mkdir(exist_ok=True)
        with style(), plt.rc_context({"text.parse_math": True}):
            draw_plane(saes[0], rows[folds[0]])
            draw_gate(demo)
        draw_grid(clip_files, load_processing(folder / "model")[0], saes, rows, labels, folds)


@torch.no_grad()
def draw_plane(sae: SAEModel, rows: torch.Tensor) -> None:
    """Left: one row in the plane of its own direction and its steering vector. Right: all rows, how well the SAE knows the direction."""
    gamma, lambda_ = sae.config.gamma, sae.config.lambda_
    out = sae(rows)
    vectors = steering_vector(out.latent_values, out.latent_indices, sae.W_dec, gamma)
    moved = rows + lambda_ * vectors
    angles = torch.rad2deg(torch.arccos(torch.cosine_similarity(rows, moved).clamp(-1, 1)))
    chosen = int((angles - angles.median()).abs().argmin())  # the row that turns as much as the middle one does
    row, vector = rows[chosen].double(), vectors[chosen].double()
    figure, (left, right) = plt.subplots(1, 2, figsize=(PAGE, 2.8), layout="constrained")

    first = row / row.norm()
    rest = vector - (vector @ first) * first
    second = rest / rest.norm()
    flat = {
        "x": (float(row.norm()), 0.0),
        "sum": tuple(float((row + lambda_ * vector) @ axis) for axis in (first, second)),
    }
    length = np.hypot(*flat["sum"])
    flat["result"] = tuple(number * flat["x"][0] / length for number in flat["sum"])
    radius = flat["x"][0]
    turn = np.linspace(-0.2, 0.9, 200)
    left.plot(radius * np.cos(turn), radius * np.sin(turn), color=GREY, lw=1, ls="--")
    arrow = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.008}
    left.quiver(0, 0, *flat["x"], color=BLUE, **arrow)
    left.quiver(*flat["x"], *(np.subtract(flat["sum"], flat["x"])), color=GREEN, **arrow)
    left.quiver(0, 0, *flat["result"], color=RED, **arrow)
    left.plot(*zip(flat["result"], flat["sum"], strict=True), color=GREY, lw=1, ls=":")
    left.annotate("x", flat["x"], (-30, 4), textcoords="offset points", color=BLUE, fontsize=9)
    middle = np.add(flat["x"], flat["sum"]) / 2
    left.annotate(r"$\lambda v$", middle, (8, -4), textcoords="offset points", color=GREEN, fontsize=9)
    left.annotate(r"$\hat{x}$", flat["result"], (-16, 6), textcoords="offset points", color=RED, fontsize=9)
    left.annotate(
        "the norm of x", (radius * np.cos(0.8), radius * np.sin(0.8)), (8, 0), textcoords="offset points", color=GREY
    )
    left.set(
        aspect="equal",
        xlim=(0, 1.12 * max(radius, flat["sum"][0])),
        ylim=(-0.12 * radius, 0.85 * radius),
        xlabel="along x",
        ylabel="across x",
        title=f"One digit: turned by {float(angles[chosen]):.0f}°, norm kept",
    )

    away = torch.cosine_similarity(vectors, rows - sae.mean)
    fvu = out.fvu
    right.scatter(fvu, away, s=6, color=BLUE, alpha=0.5, linewidths=0)
    grid = np.linspace(0, float(fvu.max()), 200)
    right.plot(grid, np.sqrt(np.clip(1 - grid, 0, None)), color=RED, lw=1.5, label=r"$\sqrt{1 - \mathrm{FVU}}$")
    right.set(
        xlabel="per-sample FVU", ylabel=r"cosine of $v$ and $x - \mu$", title=f"All {len(rows)} digits of one fold"
    )
    right.legend(frameon=False)
    save(figure, "steering.png")


def draw_gate(demo) -> None:
    """Per-sample FVU over the gate's threshold: 1 is the gate."""
    figure, axes = plt.subplots(figsize=(PAGE, 3), layout="constrained")
    sets = {"digits, not trained on": demo.relative_fvu, **{group.name: group.relative_fvu for group in demo.foreign}}
    bins = np.geomspace(0.05, 30, 60)
    for (name, values), colour in zip(sets.items(), (BLUE, RED, GREEN, PINK, GREY), strict=True):
        share = (values <= 1).double().mean()
        axes.hist(
            values.clamp(bins[0], bins[-1]).numpy(),
            bins,
            weights=np.full(len(values), 100 / len(values)),
            histtype="step" if name != "digits, not trained on" else "stepfilled",
            alpha=1 if name != "digits, not trained on" else 0.45,
            color=colour,
            lw=1.6,
            label=f"{name}: {percent(float(share), 0)} steered",
        )
    axes.axvline(1, color="black", lw=1)
    axes.annotate("gate", (1, axes.get_ylim()[1]), (4, -12), textcoords="offset points")
    axes.set(
        xscale="log", xlabel=rf"per-sample FVU / $\tau$ (quantile {GATE} of held-out digits)", ylabel="% of the images"
    )
    axes.legend(frameon=False)
    save(figure, "gate.png")


def draw_grid(model, tokenizer, saes, rows, labels, folds) -> None:
    """Gain over gamma and lambda: each fold by its own SAE, then all digits together."""
    gammas, lambdas = np.linspace(0.75, 3, 10).tolist(), np.linspace(0, 4.2, 15).tolist()
    right, plain = torch.zeros(len(gammas), len(lambdas), dtype=torch.float64), 0.0
    for sae, fold in zip(saes, folds, strict=True):
        steered = VS2CLIPForZeroShot(model.clip, sae)
        embeds = class_embeddings(model.clip, tokenizer, DIGIT_NAMES, templates="single")
        grid = steering_grid(steered, rows[fold], labels[fold], embeds, gammas, lambdas)
        right += grid.top1 * len(fold) / len(rows)
        plain += grid.plain * len(fold) / len(rows)
    title = f"All digits, no gate; plain CLIP {plain:.1f} %"
    print(plot_grid(SteeringGrid(right, plain), gammas, lambdas, IMAGES / "grid.png", own=(1.5, 2.1), title=title))


def save(figure, name: str) -> None:
    figure.savefig(IMAGES / name, dpi=200, metadata={"Software": None})
    plt.close(figure)
    print(IMAGES / name)


if __name__ == "__main__":
    main()
