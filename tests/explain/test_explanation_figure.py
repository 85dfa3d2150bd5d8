"""The picture of an explanation: drawn for every kind of image and label set, legible, and faithful to the numbers."""

import numpy as np
import pytest
from conftest import make_tiny_clip
from PIL import Image
from steered import cls_rows, fitted_sae, make_classes, make_inputs

from hf_vs2 import VS2CLIPForZeroShot


figure_module = pytest.importorskip("matplotlib.figure")

from hf_vs2.explain.figure import draw_explanation, leading_labels  # noqa: E402


@pytest.fixture()
def explanation():
    clip = make_tiny_clip()
    model = VS2CLIPForZeroShot(clip, fitted_sae(clip)).eval()
    rows = cls_rows(clip, make_inputs(8)["pixel_values"])
    model.set_steering(fvu_threshold=model.steer_cls(rows).fvu.median().item())
    return model.explain_from_cls(rows, make_classes(30), [f"a rather long label, number {n}" for n in range(30)])


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_picture_shows_every_part_and_nothing_overlaps(explanation, suffix, tmp_path, monkeypatch):
    """Every bar that the sum needs is drawn, with its number, and no row of text lies on another."""
    drawn = []
    save = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure,
        "savefig",
        lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs)),
    )
    image = int(explanation.steered.nonzero()[0])
    path = tmp_path / "new" / f"why{suffix}"
    picture = Image.linear_gradient("L")
    assert draw_explanation(explanation, picture, path, image=image, title="an image", num_latents=4) == path
    assert path.stat().st_size > 5000 and [one.name for one in path.parent.iterdir()] == [path.name]
    (figure,) = drawn
    panels = figure.subfigs[1].axes
    labels = leading_labels(explanation, 3, image)
    assert labels[0] == int(explanation.steered_scores[image].argmax()) and len(panels) == len(labels)
    for axes, label in zip(panels, labels, strict=True):
        parts = explanation.parts(label, image, 4)
        sizes = [one["contribution"] for one in parts["latents"]] + [parts["others"], parts["normalisation"]]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx(sizes)
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
        assert ends[-1] == pytest.approx(parts["steered"])
        names = [tick.get_text() for tick in axes.get_yticklabels()]
        assert names[1:5] == [f"#{one['latent']}" for one in parts["latents"]] and len(set(names)) == len(names)
    figure.canvas.draw()
    for axes in (*figure.subfigs[0].axes, *panels):
        boxes = [tick.get_window_extent() for tick in axes.get_yticklabels()]
        boxes.sort(key=lambda box: box.y0)
        assert all(below.y1 <= above.y0 + 1 for below, above in zip(boxes, boxes[1:], strict=False))
        assert all(box.x0 >= -1 for box in boxes), "a label leaves the picture"
        assert axes.title.get_window_extent().x1 <= figure.bbox.x1, "a title leaves the picture"


def test_labels_and_titles_are_text(explanation, tmp_path):
    """A label with dollar signs is no formula: the picture failed, or showed another label."""
    explanation.labels = (r"$5 \bill$", r"a_{b}^2 $x$", *explanation.labels[2:])
    path, title = tmp_path / "why.svg", "$5 and $6.png"
    with pytest.importorskip("matplotlib").rc_context({"svg.fonttype": "none"}):
        draw_explanation(explanation, Image.linear_gradient("L"), path, title=title, num_labels=30)
    for text in (title, *explanation.labels[:2]):
        assert f"{text}</text>" in path.read_text()


def test_image_left_alone_is_drawn_without_movers(explanation, tmp_path):
    """A picture for an image that the gate held back shows the two equal answers, and blames no latent."""
    image = int((~explanation.steered).nonzero()[0])
    path = draw_explanation(explanation, Image.linear_gradient("L"), tmp_path / "why.png", image=image)
    steered = draw_explanation(
        explanation, Image.linear_gradient("L"), tmp_path / "other.png", image=int(explanation.steered.nonzero()[0])
    )
    assert Image.open(path).height < Image.open(steered).height
    pixels = np.asarray(Image.open(path).convert("L"))
    assert 0.02 < (pixels < 250).mean() < 0.7


def test_other_formats_are_refused(explanation, tmp_path):
    """A suffix that can't be drawn is said at once, and leaves no file."""
    with pytest.raises(ValueError, match=r"why\.gif: its suffix must be one of \.png"):
        draw_explanation(explanation, Image.linear_gradient("L"), tmp_path / "why.gif")
    assert not list(tmp_path.iterdir())
