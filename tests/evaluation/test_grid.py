"""The grid in closed form: every cell must be what the model itself, set to that gamma and lambda, gives."""

from collections.abc import Iterator

import pytest
import torch
from conftest import make_tiny_clip
from recorders import Recorder
from torch import nn
from torch.nn.functional import normalize
from toy import make_rows, make_sae

from hf_vs2 import VS2CLIPForZeroShot
from hf_vs2.evaluation import grid
from hf_vs2.evaluation.grid import SteeringGrid, _direction, fold_tail, plot_grid, scores_along, steering_grid


NUM_CLASSES = 7
GAMMAS, LAMBDAS = [-1.0, 0.5, 1.0, 1.5, 3.0], [-2.0, 0.0, 0.7, 2.1, 40.0]


@torch.no_grad()
def make_model(seed: int = 0, **settings) -> VS2CLIPForZeroShot:
    """With a `post_layernorm` that is no identity, and an epsilon large enough to matter for the smallest rows."""
    clip = make_tiny_clip()
    norm = clip.vision_model.post_layernorm
    torch.manual_seed(seed)
    norm.weight.normal_(1, 0.5)
    norm.bias.normal_(0, 0.5)
    norm.eps = 1e-3
    return VS2CLIPForZeroShot(clip, make_sae(hidden_size=32, seed=seed, num_latents=64, top_k=8), **settings)


def material(seed: int = 0, num_rows: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, some of zeros and some far shorter or longer than the others, labels, and unit class embeddings."""
    rows = make_rows(num_rows, hidden_size=32, seed=seed) * torch.logspace(-3, 1, num_rows).unsqueeze(-1)
    rows[::97] = 0
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_rows,), generator=generator)
    return rows, labels, normalize(torch.randn(NUM_CLASSES, 24, generator=generator), dim=-1)


@torch.no_grad()
def replayed(model: VS2CLIPForZeroShot, rows: torch.Tensor, classes: torch.Tensor, **settings) -> torch.Tensor:
    with model.steering(**settings):
        return model.image_features_from_cls(rows).features @ classes.T


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_cell_is_the_replays(seed: int) -> None:
    """A heat map is read cell by cell: one that is not the model's own accuracy there would choose the wrong setting."""
    model = make_model(seed)
    rows, _, classes = material(seed)
    labels = replayed(model, rows, classes, gamma=1.5, lambda_=0.7).argmax(-1)  # so that the cells differ
    found = steering_grid(model, rows, labels, classes, GAMMAS, LAMBDAS, batch_size=64)
    assert found.top1.max() == found.top1[GAMMAS.index(1.5), LAMBDAS.index(0.7)] and found.top1.min() < 60
    for i, gamma in enumerate(GAMMAS):
        for j, lambda_ in enumerate(LAMBDAS):
            expected = replayed(model, rows, classes, gamma=gamma, lambda_=lambda_)
            best = expected.topk(2).values
            ties = (best[:, 0] - best[:, 1] < 1e-5 * expected.norm(dim=-1)).sum()
            right = (expected.argmax(-1) == labels).sum()
            assert abs(found.top1[i, j] * len(rows) / 100 - right) <= ties + 1e-6, (gamma, lambda_)
            assert ties < 3  # or any result would pass


@pytest.mark.parametrize("alpha", [-1.3, -0.4, 0.0, 1.05, 50.0])
@torch.no_grad()
def test_scores_are_the_replays(alpha: float) -> None:
    """A wrong epsilon, norm or bias may leave most predictions alone, and show on a user's data set only."""
    model = make_model()
    rows, _, classes = material()
    alphas = torch.tensor([7.0, alpha, 0.2], dtype=torch.float64)
    found = torch.cat(list(scores_along(rows, _direction(model, rows), fold_tail(model.clip, classes), alphas)))[1]
    expected = replayed(model, rows, classes, gamma=1 + alpha, lambda_=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    norm, projection = model.clip.vision_model.post_layernorm, model.clip.visual_projection
    bias = classes @ projection(norm.bias)
    torch.testing.assert_close(found[0], bias)  # a row of zeros stays one
    (to_zero,) = scores_along(rows, -rows, fold_tail(model.clip, classes), torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(to_zero[0], bias.expand_as(to_zero[0]))  # as does one that is moved to zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gamma_1_and_lambda_0_are_plain_clip(dtype: torch.dtype) -> None:
    """Gains are read against these cells: plain CLIP's own predictions, not some that are nearly so."""
    model = make_model().to(dtype)
    rows, labels, classes = material()
    found = steering_grid(model, rows, labels, classes, GAMMAS, LAMBDAS, batch_size=len(rows))
    with model.steering(enabled=False), torch.no_grad():
        scores = normalize(model.image_features_from_cls(rows).features.float(), dim=-1) @ classes.T
    assert found.plain == 100 * (scores.argmax(-1) == labels).double().mean().item()
    assert (found.top1[GAMMAS.index(1.0)] == found.plain).all() and (
        found.top1[:, LAMBDAS.index(0.0)] == found.plain
    ).all()
    assert found.top1.shape == (len(GAMMAS), len(LAMBDAS)) and found.top1.dtype == torch.float64


def test_equal_steps_are_one_cell(monkeypatch) -> None:
    """A 21 x 21 grid holds fewer steps than cells; rounding of `lambda (gamma - 1)` must not tell 0.3 from 3 * 0.1."""
    tried = []

    def recorded(x, direction, tail, alphas) -> Iterator[torch.Tensor]:
        tried.append(alphas.tolist())
        return scores_along(x, direction, tail, alphas)

    monkeypatch.setattr(grid, "scores_along", recorded)
    rows, labels, classes = material()
    model = make_model()
    model.set_steering(gamma=7.0, lambda_=5.0)
    before = model.steering_settings
    found = steering_grid(model, rows, labels, classes, [1.1, 1.3, 1.0], [0.1, 0.3], batch_size=300)
    assert tried == [[0.01, 0.03, 0.09]] * 2 and found.top1[0, 1] == found.top1[1, 0]
    assert model.steering_settings == before


def test_memory_is_that_of_a_block(monkeypatch) -> None:
    """A million rows from a store must not need a million rows of scores, nor a block those of all steps at once."""
    monkeypatch.setattr(grid, "SCORES_AT_ONCE", 2000)
    model, sizes = make_model(), []
    for num_rows in (128, 512):
        rows, labels, classes = material(num_rows=num_rows)
        with Recorder() as made:
            steering_grid(model, rows, labels, classes, GAMMAS, LAMBDAS, batch_size=64)
        sizes.append(made.largest)
    assert sizes == [64 * 64] * 2  # a block's pre-activations


def test_what_the_closed_form_does_not_hold_for_is_refused() -> None:
    """A gate, another method or another tail would give a grid of something else than was asked for."""
    rows, labels, classes = material()

    def run(model=None, rows=rows, labels=labels, classes=classes, gammas=GAMMAS, lambdas=LAMBDAS) -> None:
        steering_grid(model or make_model(), rows, labels, classes, gammas, lambdas)

    for settings in ({"fvu_threshold": 0.5}, {"method": "centroid"}, {"method": "none"}):
        with pytest.raises(ValueError, match="The grid is of method='vs2' without a gate"):
            run(make_model(**settings))
    model = make_model()
    with model.steering(enabled=False), pytest.raises(ValueError, match="enabled=False"):
        run(model)
    clip = make_tiny_clip()
    saes = {layer: make_sae(hidden_size=32, num_latents=64) for layer in (1, 2)}
    with pytest.raises(ValueError, match="only an SAE on the last layer"):
        run(VS2CLIPForZeroShot(clip, saes))
    model.clip.vision_model.post_layernorm = nn.RMSNorm(32)
    with pytest.raises(ValueError, match="as CLIPModel has them; these are RMSNorm"):
        run(model)
    for axis in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="lambdas must be one or more finite numbers"):
            run(lambdas=axis)
    with pytest.raises(ValueError, match=r"class_embeds must be \(num_classes, 24\)"):
        run(classes=classes[:, :5])


def test_a_drawn_grid_shows_each_gain_by_its_sign(tmp_path):
    """A loss in a gain's colour, or a number of another setting, would be read off the picture as it stands."""
    pytest.importorskip("matplotlib")
    drawn = SteeringGrid(torch.tensor([[60.0, 59.0], [60.0, 63.5]], dtype=torch.float64), 60.0)
    path = plot_grid(drawn, [0.75, 1.5], [0.0, 2.1], tmp_path / "grid.svg", own=(1.5, 2.1))
    text = path.read_text()
    assert ">+3.5<" in text and ">−1.0<" in text and text.count(">0.0<") >= 2 and "plain CLIP 60.0 %" in text
    assert text.count('id="default-') == 2  # the frame
    with pytest.raises(ValueError, match="2 x 2 cells, for 1 gammas"):
        plot_grid(drawn, [1.5], [0.0, 2.1], tmp_path / "grid.svg")
