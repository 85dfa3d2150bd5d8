"""The atlas: its figures are those of the model, its folder is whole or not there, and nothing in it is taken for markup."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from commands import complaint, run
from conftest import make_tiny_clip
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPImageProcessorPil
from words import make_word_tokenizer

from hf_vs2 import SAEConfig, SAEModel, VS2CLIPForZeroShot, build_atlas, evaluate, measure_statistics, steering_grid
from hf_vs2.atlas.build import _facts
from hf_vs2.atlas.effects import effect_of
from hf_vs2.atlas.flips import movers
from hf_vs2.atlas.statistics import (
    EXAMPLES,
    NUM_BINS,
    NUM_INTERVALS,
    LatentStatistics,
    companions,
    gather,
    nearest_latents,
    spread,
)
from hf_vs2.data.images import UnreadableImageError, open_image
from hf_vs2.data.labels.prompts import class_embeddings
from hf_vs2.data.stores.activations import extract_activations
from hf_vs2.data.stores.rows import rows_of


CLASSES = ["dog", "<script>alert(1)</script>", 'cat" onmouseover="x', "bird & fish", "tree"]
N = 60


def make_images(number: int = N) -> datasets.Dataset:
    """Noise of one colour an image, stored as files are, with a label."""
    generator = np.random.default_rng(0)
    encoded = []
    for _ in range(number):
        pixels = generator.integers(0, 256, 3) + generator.integers(-30, 30, (40, 40, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue(), "path": "<b>.png"})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    labels = generator.integers(0, len(CLASSES), number).tolist()
    return datasets.Dataset.from_dict({"image": encoded, "label": labels}, features=features)


def extract(dataset: datasets.Dataset, folder: Path, **options):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    options = {"image_processor": processor, "label_column": "label", "progress": False, **options}
    return extract_activations(make_tiny_clip(), dataset, folder, **options)


@torch.no_grad()
def make_model(rows: torch.Tensor, **settings) -> VS2CLIPForZeroShot:
    torch.manual_seed(1)
    sae = SAEModel(SAEConfig(hidden_size=32, num_latents=70, top_k=6)).eval()
    sae.set_statistics(rows.mean(0), (rows - rows.mean(0)).square().sum(-1).mean())
    sae.W_enc[3], sae.b_enc[3] = 0, -100  # a latent that is silent whatever comes
    sae.config.fvu_quantiles = {str(q): float(sae(rows).fvu.quantile(q)) for q in (0.5, 0.9)}
    return VS2CLIPForZeroShot(make_tiny_clip(), sae, **{"gamma": 3.0, "lambda_": 2.0, "gate": 0.9} | settings).eval()


class Made:
    """An atlas with everything, and what went into it."""

    def __init__(self, root: Path):
        self.dataset = make_images()
        self.store = extract(self.dataset, root / "rows")
        self.rows, self.labels = self.store.tensor(), self.store.labels
        self.model, self.tokenizer = make_model(self.rows), make_word_tokenizer()
        self.results = evaluate(self.model, self.store, None, None, self.tokenizer, num_resamples=100)
        log = [{"step": step, "loss": 1 / step, "fvu": 1 / step, "dead_share": 0.0} for step in (50, 100)]
        (root / "training_log.json").write_text(json.dumps({"metrics": {"fvu": 0.5}, "log": log}))
        options = {"results": self.results, "training_log": root / "training_log.json", "top_images": 5}
        page = build_atlas(
            self.model, self.tokenizer, self.store, self.dataset, root / "atlas", batch_size=16, **options
        )
        self.folder = page.parent
        self.latents = json.loads((self.folder / "latents.json").read_text(encoding="utf-8"))["latents"]
        self.index = registered(self.folder / "data" / "latents.js")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    return Made(tmp_path_factory.mktemp("atlas"))


def registered(path: Path):
    """What a data script hands over, read without a browser."""
    text = path.read_text(encoding="ascii")
    head = f'atlas.register("{path.stem}", '
    assert text.startswith(head) and text.endswith(");\n")
    return json.loads(text[len(head) : -3])


def test_the_gate_that_is_shown_is_that_of_the_answers(made):
    """An atlas replays VS2: of a checkpoint that answers otherwise it said that there is no gate, beside gated answers."""
    model = make_model(made.rows)
    model.set_domain_statistics(measure_statistics(model.sae, made.rows, held_out=torch.arange(20)))
    model.set_steering(method="prototypes")  # whose gate goes by the distance
    assert _facts(model, "words", {})["fvu_threshold"] == pytest.approx(model.sae.fvu_threshold(0.9), rel=1e-3)


# Statistics


@pytest.mark.parametrize("block", [1, 7, 100])
def test_running_statistics_are_those_of_the_whole_matrix(block):
    """Blocks, ties and negative values must not change a count, a mean or which image comes first."""
    generator = torch.Generator().manual_seed(0)
    # Few different values, so that many are equal; negative ones as with activation="absolute", zeros as after ReLU.
    values = torch.randint(-2, 5, (83, 4), generator=generator) / 2
    indices = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(83)])
    labels = torch.randint(0, 3, (83,), generator=generator)
    statistics = LatentStatistics(num_latents=9, top=5, num_classes=3)
    for part in range(0, 83, block):
        statistics.add(*(whole[part : part + block] for whole in (values, indices, labels)))

    dense = torch.zeros(83, 9).scatter(1, indices, values)
    assert torch.equal(statistics.count, (dense != 0).sum(0))
    torch.testing.assert_close(statistics.share, (dense != 0).double().mean(0))
    torch.testing.assert_close(statistics.mean, dense.double().sum(0) / (dense != 0).sum(0))
    assert torch.equal(statistics.high, dense.amax(0)) and torch.equal(statistics.low, dense.amin(0))
    for latent in range(9):
        rows = (dense[:, latent] != 0).nonzero().squeeze(-1)
        ranked = sorted(rows.tolist(), key=lambda row: (-dense[row, latent].item(), row))
        assert statistics.strongest.of(latent) == ranked[:5]
        assert statistics.by_class[latent].tolist() == labels[rows].bincount(minlength=3).tolist()


@torch.no_grad()
def test_gathered_figures_are_those_of_the_sae(made):
    """Two passes over a store in blocks must see what one call of the SAE sees."""
    code = made.model.sae(made.rows)
    dense = torch.zeros(N, 70).scatter(1, code.latent_indices, code.latent_values)
    statistics = gather(made.model, rows_of(made.store), made.labels, 5, 4, batch_size=13)
    values = spread(made.model, rows_of(made.store), statistics.low, statistics.high, batch_size=13)
    counts, examples = values
    assert torch.equal(statistics.count, (dense != 0).sum(0)) and statistics.count[3] == 0
    torch.testing.assert_close(torch.cat(statistics.fvu), code.fvu)
    assert torch.equal(counts.sum(-1), statistics.count)
    for latent in statistics.count.topk(5).indices.tolist():
        values = dense[:, latent][dense[:, latent] != 0]
        expected, _ = np.histogram(values.numpy(), bins=NUM_BINS, range=(0, float(values.max())))
        assert counts[latent].tolist() == expected.tolist()
        edges = np.linspace(0, float(values.max()), NUM_INTERVALS + 1)
        for number, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            rows = examples.of(latent * NUM_INTERVALS + number)
            inside = [low - 1e-5 <= dense[row, latent] <= high + 1e-5 for row in rows]
            assert all(inside) and len(set(rows)) == min(
                EXAMPLES, counts[latent].view(NUM_INTERVALS, -1)[number].sum()
            )


def test_companions_are_those_that_fire_together_more_than_chance_gives():
    """Two latents that are both active everywhere say nothing of each other, and a latent is no companion of its own."""
    active = torch.tensor([[0, 1, 4], [0, 1, 4], [0, 1, 4], [2, 3, 4], [2, 4, 5], [3, 4, 5], [5, 4, 6], [5, 4, 6]])
    found = companions(active.to(torch.int32), 6, number=3)  # 6 stands for no further latent
    assert found[0] == [(1, 3)] and found[1] == [(0, 3)] and found[4] == []


def test_nearest_latents_are_those_of_the_full_matrix():
    """A latent must not be its own neighbour, and blocks must not lose one."""
    decoder = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    indices, cosines = nearest_latents(decoder, 4, block=7)
    full = normalize(decoder, dim=-1) @ normalize(decoder, dim=-1).T
    full.fill_diagonal_(-2)
    best = full.topk(4)
    assert torch.equal(indices, best.indices)
    torch.testing.assert_close(cosines, best.values)


@torch.no_grad()
def test_a_push_is_what_the_latent_adds_to_the_margin(made):
    """The figure beside a latent must be its term of the sum that the margin is, with LayerNorm and length as steered."""
    model, rows = made.model, made.rows[:4]
    embeds = class_embeddings(model.clip, made.tokenizer, CLASSES)
    old, new = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 3, 0, 1])
    norm, scale = model.clip.vision_model.post_layernorm, model.clip.logit_scale.exp()
    y, code = model.steer_cls(rows).rows, model.sae(rows)
    moved = rows + 2.0 * (3.0 - 1) * (code.reconstruction - model.sae.b_pre)
    shrunk = rows.norm(dim=-1) / moved.norm(dim=-1)
    length = model.clip.visual_projection(norm(y)).norm(dim=-1)
    deviation = (y.var(-1, unbiased=False) + norm.eps).sqrt()
    towards = (embeds[new] - embeds[old]) @ model.clip.visual_projection.weight * norm.weight
    with model.steering(gate=None):
        found = movers(model, rows, old, new, embeds, 3)
    for row, latents in enumerate(found):
        pushes = []
        for value, latent in zip(code.latent_values[row], code.latent_indices[row], strict=True):
            d = model.sae.W_dec[latent] - model.sae.W_dec[latent].mean()
            pushes.append(
                (scale * shrunk[row] * 4.0 * value * (towards[row] @ d) / (deviation[row] * length[row])).item()
            )
        largest = sorted(pushes, key=abs, reverse=True)[:3]
        assert [one.push for one in latents] == pytest.approx(largest, rel=1e-3)


@torch.no_grad()
def test_what_a_latent_does_is_steering_with_all_others_left_alone(made):
    """The points beside a class must be those of the model itself, with a gamma of 1 for every other latent."""
    embeds = class_embeddings(made.model.clip, made.tokenizer, CLASSES)
    latent = int(made.model.sae(made.rows).latent_indices.flatten().bincount().argmax())
    chosen = [row for row in range(N) if latent in made.model.sae(made.rows[row : row + 1]).latent_indices][:7]
    found = effect_of(made.model, rows_of(made.store), chosen, latent, embeds)

    def probabilities(**settings):
        with made.model.steering(**settings):
            features = normalize(made.model.image_features_from_cls(made.rows[chosen]).features, dim=-1)
        return (made.model.clip.logit_scale.exp() * features @ embeds.T).softmax(-1)

    gamma = tuple(3.0 if one == latent else 1.0 for one in range(70))
    plain, steered = probabilities(enabled=False), probabilities(gamma=gamma, gate=None)
    expected = 100 * (steered - plain).mean(0)
    assert found.images == 7 and found.classes
    for number, points in found.classes:
        assert points == pytest.approx(expected[number].item(), abs=1e-3)
    assert sum(one[2] for one in found.changes) == int((plain.argmax(-1) != steered.argmax(-1)).sum())


# The folder


@torch.no_grad()
def test_latents_json_says_what_the_model_does(made):
    """Programs read figures off this file; each is compared with the SAE run on all rows."""
    code = made.model.sae(made.rows)
    dense = torch.zeros(N, 70).scatter(1, code.latent_indices, code.latent_values)
    assert [one["index"] for one in made.latents] == list(range(70))
    for latent in made.latents:
        values = dense[:, latent["index"]]
        active = values != 0
        assert latent["share"] == pytest.approx(active.double().mean().item(), rel=1e-3)
        assert latent["max"] == pytest.approx(values.max().item(), rel=1e-3)
        shown = [one["row"] for one in latent["top_images"]]
        assert shown == values.argsort(descending=True, stable=True)[: min(5, int(active.sum()))].tolist()
        for known in latent["classes"]:
            members = made.labels == CLASSES.index(known["name"])
            frequency = active[members].double().mean().item()
            assert known["frequency"] == pytest.approx(frequency, rel=1e-3)
            assert known["lift"] == pytest.approx(frequency / active.double().mean().item(), rel=1e-2)
        assert len(latent["names"]) == len(latent["away"]) == 5 and len(latent["nearest"]) == 6
        assert not latent["named"] or latent["names"][0]["score"] >= made.index["floor"]
    assert not made.latents[3]["top_images"] and made.latents[3]["mean"] == 0


def test_thumbnails_are_of_the_images_shown_and_of_no_others(made):
    """50,000 images make a small folder only if each image shown is written once and the rest not at all."""
    overview = registered(made.folder / "data" / "overview.js")
    shown = {one["row"] for latent in made.latents for one in latent["top_images"]}
    shown |= {one["image"] for one in [*overview["fixed"], *overview["broken"]]}
    for path in (made.folder / "data").glob("latents-*.js"):
        details = registered(path)["latents"]
        shown |= {image for one in details for _, some in one["intervals"] for image, _ in some}
    files = {int(path.stem): path for path in (made.folder / "thumbs").rglob("*.jpg")}
    assert files.keys() == shown
    for row, path in files.items():
        original = np.asarray(open_image(made.dataset[row]["image"]), dtype=float).mean((0, 1))
        small = Image.open(path)
        assert small.size == (40, 40) and not small.info.get("exif")
        np.testing.assert_allclose(np.asarray(small, dtype=float).mean((0, 1)), original, atol=4)


@torch.no_grad()
def test_fixed_and_broken_images_are_those_of_the_model(made):
    """An example must be one: plain and steered CLIP are run again on its row, and its latents must explain the change."""
    overview = registered(made.folder / "data" / "overview.js")
    embeds = class_embeddings(made.model.clip, made.tokenizer, CLASSES)
    assert overview["fixed"] and overview["broken"]

    def answers(**settings):
        with made.model.steering(**settings):
            return normalize(made.model.image_features_from_cls(made.rows).features, dim=-1) @ embeds.T

    plain, steered = answers(enabled=False), answers()
    right = (plain.argmax(-1) == made.labels).double(), (steered.argmax(-1) == made.labels).double()
    assert overview["accuracy"]["plain"] == pytest.approx(100 * right[0].mean().item(), rel=1e-3)
    assert overview["accuracy"]["steered"] == pytest.approx(100 * right[1].mean().item(), rel=1e-3)
    for kind, before, after in (("fixed", 0, 1), ("broken", 1, 0)):
        assert overview["accuracy"][kind] == int(((right[0] == before) & (right[1] == after)).sum())
        for one in overview[kind]:
            row = one["image"]
            assert (right[0][row], right[1][row]) == (before, after)
            assert (one["old"], one["new"]) == (plain[row].argmax(), steered[row].argmax())
            latent, _, push = one["movers"][0]
            # Without the latent that pushed most, the margin of the new class must shrink (or grow, where it held against).
            gamma = torch.full((70,), 3.0)
            gamma[latent] = 1.0
            without = answers(gamma=tuple(gamma.tolist()))[row]
            margin = steered[row][one["new"]] - steered[row][one["old"]]
            assert (margin - (without[one["new"]] - without[one["old"]])).sign() == np.sign(push)
    gains = {one["index"]: one for one in overview["classes"]}
    for number in range(len(CLASSES)):
        members = made.labels == number
        assert gains[number]["steered"] == pytest.approx(100 * right[1][members].mean().item(), rel=1e-3)


def test_overview_shows_the_comparison_and_the_grid_as_they_are(made):
    """The table must be the result file's, the heat map steering_grid's, with the checkpoint's own setting among its cells."""
    overview = registered(made.folder / "data" / "overview.js")
    assert [row["method"] for row in overview["results"]["rows"]][:2] == ["plain CLIP", "centroid, no SAE"]
    assert [row["top1"] for row in overview["results"]["rows"]] == [row["top1"] for row in made.results.rows]
    grid = overview["grid"]
    assert 3.0 in grid["gammas"] and 2.0 in grid["lambdas"]
    embeds = class_embeddings(made.model.clip, made.tokenizer, CLASSES)
    with made.model.steering(gate=None):
        expected = steering_grid(made.model, made.store, None, embeds, grid["gammas"], grid["lambdas"])
    np.testing.assert_allclose(grid["top1"], expected.top1.numpy(), rtol=1e-3)
    own = grid["top1"][grid["gammas"].index(3.0)][grid["lambdas"].index(2.0)]
    assert own == pytest.approx(made.results.row("vs2")["top1"], rel=1e-3)
    assert overview["training"]["steps"] == [50, 100] and overview["training"]["fvu"] == [0.02, 0.01]
    assert sum(overview["fvu"]["counts"]) == N
    assert overview["fvu"]["steered"] == pytest.approx(made.results.row("vs2+gate")["coverage"], rel=1e-3)


def test_what_lacks_its_input_is_left_out_and_says_why(made, tmp_path):
    """Unlabelled photographs are the usual case: no labels, no log, no results, a vocabulary of one's own."""
    page = build_atlas(
        made.model, made.tokenizer, made.rows, made.dataset, tmp_path / "a", vocabulary=["dog", "bird", "tree"]
    )
    overview = registered(page.parent / "data" / "overview.js")
    assert "no labels" in overview["labels_missing"] and "grid" not in overview and "fixed" not in overview
    assert "training_log.json" in overview["training"]["missing"] and "evaluate" in overview["results"]["missing"]
    latents = json.loads((page.parent / "latents.json").read_text())["latents"]
    assert not latents[0]["classes"] and {one["name"] for one in latents[0]["names"]} == {"dog", "bird", "tree"}


def test_data_scripts_hold_no_markup(made):
    """A class called </script> must not end anything; what is registered must still be exactly the class names."""
    for path in (made.folder / "data").iterdir():
        text = path.read_bytes()
        assert b"<" not in text and b">" not in text and max(text) < 128
    assert registered(made.folder / "data" / "latents.js")["class_names"] == CLASSES


def test_assets_ask_for_nothing_outside_the_folder(made):
    """An atlas that is opened offline, or shown to somebody, must not call home."""
    for path in [made.folder / "index.html", *(made.folder / "assets").iterdir()]:
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text.replace("http-equiv", "") and "innerHTML" not in text and "//cdn" not in text


def test_an_atlas_replaces_an_atlas_and_nothing_else(made, tmp_path):
    """`--output .` in a folder of results must cost nobody their files, and a failure must leave the earlier atlas."""
    folder = tmp_path / "atlas"
    shutil.copytree(made.folder, folder)
    arguments = (made.model, made.tokenizer, made.store)
    broken = made.dataset.cast_column("image", datasets.Image(decode=False)).to_list()
    broken[made.latents[0]["top_images"][0]["row"]]["image"] = {"bytes": b"not an image", "path": None}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    with pytest.raises(UnreadableImageError, match="image .* of the data set"):
        build_atlas(*arguments, datasets.Dataset.from_list(broken, features=features), folder)
    assert json.loads((folder / "latents.json").read_text())["latents"] == made.latents
    assert [path.name for path in tmp_path.iterdir()] == ["atlas"]

    build_atlas(*arguments, made.dataset, folder, top_images=2)
    assert max(len(one["top_images"]) for one in json.loads((folder / "latents.json").read_text())["latents"]) == 2
    (tmp_path / "mine").mkdir()
    for place in (folder, tmp_path / "mine"):  # also beside the pages of an earlier atlas
        (place / "thesis.txt").write_text("years of work")
        with pytest.raises(OSError, match=r"no atlas \(thesis.txt\)"):
            build_atlas(*arguments, made.dataset, place)
        assert (place / "thesis.txt").read_text() == "years of work"


def test_images_are_those_that_the_rows_were_made_from(made, tmp_path):
    """Another split would show wrong images without a word; skipped images must not shift the others; a stream shows the same."""
    with pytest.raises(ValueError, match="60 images, but the data set has 59"):
        build_atlas(made.model, made.tokenizer, made.store, made.dataset.select(range(59)), tmp_path / "a")

    undecoded = made.dataset.cast_column("image", datasets.Image(decode=False)).to_list()
    undecoded[0]["image"] = {"bytes": b"damaged", "path": None}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=CLASSES)})
    dataset = datasets.Dataset.from_list(undecoded, features=features)
    store = extract(dataset, tmp_path / "rows", on_error="skip")
    latents = []
    for images in (dataset, dataset.to_iterable_dataset()):
        page = build_atlas(made.model, made.tokenizer, store, images, tmp_path / "b", top_images=5)
        latents.append((page.parent / "latents.json").read_text())
    assert latents[0] == latents[1]
    for latent, before in zip(json.loads(latents[0])["latents"], made.latents, strict=True):
        expected = [one["row"] for one in before["top_images"] if one["row"] != 0]
        assert [one["row"] for one in latent["top_images"]][: len(expected)] == expected


# The command


def test_command_writes_an_atlas_and_reuses_activations(checkpoint, images_path, tmp_path, capsys):
    """The README's way: a checkpoint and a folder of images; a store that is there is used, one of other images refused."""
    data = ["--checkpoint", checkpoint, "--dataset", images_path, "--disable_tqdm", "--top_images", "3"]
    made = ["atlas", *data, "--split", "test", "--output", tmp_path / "atlas"]
    out = run(capsys, *made, "--activations_dir", tmp_path / "rows")
    assert (tmp_path / "atlas" / "index.html").as_uri() in out
    overview = registered(tmp_path / "atlas" / "data" / "overview.js")
    assert overview["num_images"] == 24 and overview["training"]["steps"] and "accuracy" in overview
    assert overview["facts"]["dataset"] == f"{images_path.name} test"
    for path in (tmp_path / "atlas").rglob("*.js*"):
        assert str(tmp_path.parent) not in path.read_text(encoding="utf-8")  # nobody's folders are shown around

    words = tmp_path / "words.txt"
    words.write_text("sea\nforest\nfire\n")
    (store,) = (path for path in (tmp_path / "rows").iterdir() if path.is_dir())
    run(capsys, *made, "--activations", store, "--vocabulary", words)
    latents = json.loads((tmp_path / "atlas" / "latents.json").read_text())["latents"]
    assert {name["name"] for latent in latents for name in latent["names"]} == {"sea", "forest", "fire"}
    message = complaint(capsys, "atlas", *data, "--split", "train", "--output", tmp_path / "b", "--activations", store)
    assert "are not of these images" in message
    message = complaint(capsys, "atlas", *data, "--split", "test", "--output", tmp_path, "--activations", store)
    assert "no atlas" in message
