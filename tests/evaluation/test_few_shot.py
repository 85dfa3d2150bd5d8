"""What people do with a few labelled images: rows of a comparison on the images that were not given away."""

import torch
from torch.nn.functional import normalize
from words import NAMES, compared_model, make_word_tokenizer

from hf_vs2 import evaluate
from hf_vs2.evaluation.few_shot import FEW_SHOT, cross_answers, draw_shots
from hf_vs2.evaluation.table import terminal_table


def test_scores_by_hand():
    """The equations of the papers, on two classes in the plane; a class without an image is never the nearest mean."""
    embeds = normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]), dim=-1)
    labels, classes, query = torch.tensor([0, 0, 1]), torch.eye(2), torch.tensor([[0.6, 0.8]])
    mean = normalize(torch.tensor([0.9, 0.3]), dim=0)
    found = FEW_SHOT["nearest_mean"](embeds, labels, torch.eye(3)[:, :2], 50.0)(query)
    assert torch.allclose(found, torch.tensor([[query[0] @ mean, 0.8, -1.0]]))
    near = torch.exp(-5.5 * (1 - query @ embeds.T))[0]
    expected = torch.stack([0.6 + (near[0] + near[1]) / 50, 0.8 + near[2] / 50])
    assert torch.allclose(FEW_SHOT["tip_adapter"](embeds, labels, classes, 50.0)(query)[0], expected)
    assert FEW_SHOT["linear_probe"](embeds, labels, classes, 50.0)(embeds).argmax(-1).tolist() == [0, 0, 1]


def test_labelled_images_are_drawn_evenly_and_leave_some_to_measure():
    """Seven images of one class and two of another: at 4 a class half of them stay to measure on."""
    target = torch.tensor([0] * 7 + [1] * 2)
    assert target[draw_shots(target, 4, seed=0)].bincount().tolist() == [3, 1]
    assert draw_shots(target, 2, seed=1).equal(draw_shots(target, 2, seed=1))


def test_an_image_is_never_judged_by_its_own_label():
    """In `adapt --checked` each image is answered by a fit to other images: with labels that follow nothing it is right by chance."""
    generator = torch.Generator().manual_seed(0)
    embeds = normalize(torch.randn(300, 64, generator=generator), dim=-1)
    labels = torch.randint(0, 3, (300,), generator=generator)
    for name, answers in cross_answers(embeds, labels, torch.zeros(3, 64), 50.0).items():
        assert 0.2 < (answers == labels).double().mean() < 0.47, name


def test_rows_of_a_comparison():
    """All rows are measured on the same images, those that were not given with their labels, so that gains can be compared."""
    rows = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % len(NAMES)
    options = {"templates": "single", "methods": ["vs2"], "num_resamples": 100}
    model = compared_model(rows)
    result = evaluate(model, rows, labels, NAMES, make_word_tokenizer(), few_shot=3, **options)
    assert [row["method"] for row in result.rows] == ["clip", "vs2", *FEW_SHOT]
    given = 3 * len(NAMES)
    assert {row["n"] for row in result.rows} == {60 - given} and result.rows[-1]["labelled"] == given
    kept = ~draw_shots(labels, 3, seed=0)
    alone = evaluate(model, rows[kept], labels[kept], NAMES, make_word_tokenizer(), **options)
    for one, other in zip(alone.rows, result.rows, strict=False):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert f"were given {given} other labelled images, 3 of each class" in " ".join(terminal_table(result).split())
