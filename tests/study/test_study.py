"""The study: one file in, every figure out; what was measured is kept, and is what the other doors of the package give."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import run
from made_up_study import description
from torch.nn.functional import normalize

from hf_vs2 import RetrievalCorpus, SAEModel, VS2CLIPForZeroShot
from hf_vs2.data import load_images
from hf_vs2.evaluation.comparison import evaluate
from hf_vs2.study import StudyConfig, StudyResult, run_study
from hf_vs2.study.bench import Bench
from hf_vs2.study.methods import RUNS
from hf_vs2.study.plan import plan
from hf_vs2.study.results.catalog import OWN, study_methods
from hf_vs2.study.results.cells import CELLS, Cell, CellResult, Outputs, load_cell, save_cell
from hf_vs2.study.run import _check_labels
from hf_vs2.study.views import AugmentedView


METHODS = {name: method for name, method in study_methods().items() if method.default}


@pytest.fixture(scope="module")
def study(tmp_path_factory, clip_path, images_path) -> tuple[StudyConfig, StudyResult]:
    config = StudyConfig.from_dict(description(clip_path, images_path, tmp_path_factory.mktemp("study")))
    return config, run_study(config, progress=False)


def one(result: StudyResult, method: str, prompts: str = "single", **wanted):
    """The only cell of the table with these properties."""
    (cell,) = result.select("table", dataset="colours", method=method, prompts=prompts, **wanted)
    return cell


def test_every_method_has_a_row_for_each_prompt_set_and_seed(study):
    """A method that silently drops out of the table is a hole nobody sees."""
    config, result = study
    assert set(RUNS) == set(OWN)
    for info in config.datasets:
        for name, method in METHODS.items():
            cells = result.select("table", dataset=info.name, method=name)
            assert len(cells) == len(config.prompts) * (len(config.seeds) if method.seeded else 1), name
            for cell in cells:
                outputs = cell.outputs()
                assert cell.figures["top1"] == pytest.approx(100 * outputs.right.double().mean().item(), abs=1e-3)
                assert cell.figures["n"] == len(outputs.labels) == (20 if "inner" in method.settings else 24)
    sections = {section for cell in result for section in cell.sections}
    assert sections == {"table", "top_k", "expansion", "share", "neighbors", "pass", "grid", "agreement", "gate_shift"}


def test_rows_are_those_of_evaluate(study, clip_path, images_path):
    """`hf-vs2 evaluate` and `hf-vs2 study` must not tell a user two different things about one SAE."""
    config, result = study
    bench = Bench(config, progress=False)
    row = one(result, "vs2+gate", seed=1)
    sae = SAEModel.from_pretrained(bench.train("clip", bench.spec(row.cell)))
    clip, tokenizer, _ = bench.encoder("clip")
    model = VS2CLIPForZeroShot(clip, sae, gamma=2.0, lambda_=0.9, gate=0.9)
    expected = evaluate(
        model, bench.rows("clip", "colours", "test"), None, None, tokenizer,
        templates=["single"], reference_rows=bench.rows("clip", "colours", "train"),
    )  # fmt: skip
    names = {"clip": "clip", "reconstruct": "reconstruct", "amplify": "amplify", "vs2": "vs2", "vs2+gate": "vs2+gate"}
    names |= {
        "corrected+distribution_norm": "corrected+distribution_norm",
        "prototypes+sae": "prototypes+sae",
        "vs2_pca": "vs2_pca",
    }
    for theirs, ours in names.items():
        cell = one(result, ours, seed=1 if METHODS[ours].seeded else None)
        index = expected.index(theirs)
        assert torch.equal(cell.outputs().predictions, expected.samples[index].predictions), ours
        for name in ("top1", "gain", "gain_ci", "coverage", "fixed", "broken"):
            assert cell.figures[name] == pytest.approx(expected.rows[index][name]), (ours, name)
    index = expected.index("full_distribution_norm")
    assert torch.equal(one(result, "distribution_norm_1").outputs().predictions, expected.samples[index].predictions)


def test_a_second_run_measures_nothing_and_an_interrupted_one_only_what_is_missing(study, tmp_path, monkeypatch):
    """A study of days must go on where it was killed, and give the file it would have given."""
    config, result = study
    cells = Path(config.output_dir) / CELLS
    written = {path: path.stat().st_mtime_ns for path in cells.iterdir()}
    lost = sorted(cells.glob("*.json"))[::7]
    half = sorted(cells.glob("*.safetensors"))[3]  # its JSON is there, its outcomes are not
    for path in (*lost, half):
        path.unlink()
    again = run_study(config, progress=False)
    changed = {path for path in cells.iterdir() if path.stat().st_mtime_ns != written.get(path)}
    stems = {path.stem for path in (*lost, half)}
    assert {path.stem for path in changed} == stems
    assert set(cells.iterdir()) == set(written)

    def figures(study: StudyResult) -> dict:
        timeless = [{k: v for k, v in cell.figures.items() if k != "seconds"} for cell in study]
        return {cell.cell.name: measured for cell, measured in zip(study, timeless, strict=True)}

    assert figures(again) == figures(result)
    read = StudyResult.from_json(Path(config.output_dir) / "results.json")
    assert [cell.figures for cell in read] == [cell.figures for cell in again]
    assert torch.equal(
        read.select(method="vs2")[0].outputs().predictions, again.select(method="vs2")[0].outputs().predictions
    )


def test_a_changed_setting_makes_new_cells_only_where_it_matters(study):
    """Old figures under a new setting would be wrong; measuring everything again would be a waste."""
    config, _ = study
    before = {cell.name for cell in plan(config)}

    def new(changed: StudyConfig) -> set[str]:
        return {cell.method for cell in plan(changed) if cell.name not in before}

    assert new(replace(config, steering=replace(config.steering, gate=0.5))) == {
        "vs2+gate",
        "prototypes+gate",
    }
    assert new(replace(config, views=2)) == {"ens_aug", "vs2_ens_aug"}
    assert new(replace(config, retrieval=replace(config.retrieval, rag_weight=0.1))) == {
        "rag",
        "rag_pseudo",
        "rag_oracle",
    }
    trained = {name for name, method in METHODS.items() if method.seeded} | {"grid", "steering_cosine"}
    training = replace(config.sae, training={**config.sae.training, "max_steps": 21})
    assert new(replace(config, sae=training)) == trained
    moved = replace(config, datasets=tuple(info.replace(test_split="train") for info in config.datasets))
    assert new(moved) == {cell.method for cell in plan(config)}


def test_changed_images_make_new_cells_though_the_path_stays(tmp_path, clip_path, images_path):
    """Figures of images that are no longer there would stand beside new ones, and nobody could tell."""
    images = tmp_path / "images"
    shutil.copytree(images_path, images)
    whole = description(clip_path, images, tmp_path / "out") | {"methods": ["clip", "centroid"], "prompts": ["single"]}
    whole |= {"datasets": whole["datasets"][:1], "ablations": {}, "grid": None, "gate_shift": None, "agreement": False}
    config = StudyConfig.from_dict(whole)

    def names() -> list[str]:
        return [cell.outputs_path.stem for cell in run_study(config, progress=False)]

    before = names()
    assert names() == before
    for split, changed in (("train", {"centroid", "clip"}), ("test", {"centroid", "clip"})):
        first, second = sorted((images / split / "red").iterdir())[:2]
        shutil.copy(first, second)
        after = names()
        assert {new.split("-")[2] for new, old in zip(after, before, strict=True) if new != old} == changed
        before = after


def test_the_grid_holds_plain_clip_and_the_tables_row(study):
    """The heat map and the table are two views of one thing."""
    config, result = study
    (grid,) = result.select("grid", dataset="colours", seed=0)
    assert grid.figures["plain"] == one(result, "clip").figures["top1"]
    top1 = torch.tensor(grid.figures["top1"])
    assert top1.shape == (2, 3) and (top1[:, 0] == grid.figures["plain"]).all()  # lambda 0
    gamma, lambda_ = grid.figures["default"]
    place = grid.figures["gamma"].index(gamma), grid.figures["lambda"].index(lambda_)
    assert top1[place].item() == pytest.approx(one(result, "vs2", seed=0).figures["top1"])
    assert top1[0, 2] == top1[1, 1]  # lambda (gamma - 1) is the same: 1.8 * 0.5 = 0.9 * 1


def test_the_whole_model_on_images_agrees_with_the_replay_on_rows(study):
    """Rows that run the model on images stand beside rows that replay cached activations: same images, same result."""
    config, result = study
    bench = Bench(config, progress=False)
    cell = one(result, "vs2", seed=0)
    deep = bench.deep_features("clip", bench.spec(cell.cell), 1, "vs2")
    chosen = bench.limited("colours", "test", 20)
    rows = bench.rows("clip", "colours", "test").take(chosen)
    with torch.no_grad():
        replayed = normalize(bench.model(cell.cell).image_features_from_cls(rows).features, dim=-1)
    torch.testing.assert_close(deep.features, replayed, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deep.fvu, cell.outputs().fvu[chosen], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="3 layers: 4 can't be steered"):
        bench.deep_features("clip", bench.spec(cell.cell), 4, "vs2")


def test_gains_are_against_plain_clip_on_the_same_images(study):
    """A row on 20 images must not be compared with plain CLIP on 24."""
    config, result = study
    chosen = Bench(config, progress=False).limited("colours", "test", 20)
    plain, deep = one(result, "clip").outputs(), one(result, "rec_a", seed=0)
    assert torch.equal(deep.outputs().images, chosen)
    right = plain.right[chosen]
    gain = 100 * (deep.outputs().right.double().mean() - right.double().mean()).item()
    assert deep.figures["gain"] == pytest.approx(gain, abs=1e-3)
    assert torch.equal(deep.outputs().labels, plain.labels[chosen])


def test_one_sae_of_several_data_sets_stands_behind_table_3(study):
    """The gate under shift is about one SAE: its rows must not quietly use one SAE a data set."""
    config, result = study
    bench = Bench(config, progress=False)
    folders = {
        bench.train("clip", bench.spec(cell.cell)) for cell in result.select("gate_shift", method="vs2", seed=0)
    }
    (folder,) = folders
    config_of = SAEModel.from_pretrained(folder).config
    assert config_of.training_data["num_rows"] == 120 + 60
    gated = result.select("gate_shift", method="vs2+gate", dataset="colours", seed=0)[0]
    outputs = gated.outputs()
    assert torch.equal(outputs.steered, outputs.fvu <= config_of.fvu_threshold(0.5))
    plain = one(result, "clip").outputs()
    assert torch.equal(outputs.predictions[~outputs.steered], plain.predictions[~outputs.steered])


def assert_scores(bench: Bench, cell, expected: np.ndarray):
    """The method gives these scores, up to what all classes of an image share, and the cell's predictions are theirs."""
    with torch.no_grad():
        scores = torch.cat([batch.scores for batch in RUNS[cell.cell.method](bench, cell.cell)]).double().numpy()
    centred = [one - one.mean(1, keepdims=True) for one in (scores, expected)]
    np.testing.assert_allclose(*centred, atol=2e-5, rtol=1e-4, err_msg=cell.cell.name)
    chosen = scores[np.arange(len(scores)), cell.outputs().predictions.numpy()]
    np.testing.assert_allclose(chosen, scores.max(1), atol=1e-4, err_msg=cell.cell.name)


def test_rows_are_their_formulas(study):
    """Each control and baseline must be what its name says: computed again from the rows, by the definition, image by image."""
    config, result = study
    bench = Bench(config, progress=False)

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def embed(rows):
        with torch.no_grad():
            return bench.embed("clip", torch.as_tensor(rows, dtype=torch.float32)).numpy().astype(np.float64)

    def keep_norm(moved, x):
        return unit(moved) * np.linalg.norm(x, axis=-1, keepdims=True)

    train, test = (bench.rows("clip", "colours", split).tensor().numpy() for split in ("train", "test"))
    classes = bench.class_matrix("clip", "colours", "single").numpy().astype(np.float64)
    query, corpus = embed(test), embed(train)
    alpha = 0.9 * (2.0 - 1)

    half = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))[: len(train) // 2].numpy()
    for rows, cell in (
        (train, one(result, "centroid")),
        (train[half], result.select("share", dataset="colours", method="centroid", share=0.5, seed=1)[0]),
    ):
        assert_scores(bench, cell, embed(keep_norm(test + alpha * (test - rows.mean(0)), test)) @ classes.T)
    assert_scores(bench, one(result, "mean_logit"), query @ classes.T - (corpus @ classes.T).mean(0))

    true, guess = bench.labels("clip", "colours", "train").numpy(), (corpus @ classes.T).argmax(1)
    nearest = np.argsort(-(query @ corpus.T), axis=1, kind="stable")[:, :5]
    for labels, suffix in ((guess, "_pseudo"), (true, "_oracle")):
        rag, steered = [], []
        for q, found in zip(query, nearest, strict=True):
            counts = [(labels[found] == label).sum() for label in labels[found]]
            positive = labels[found] == labels[found][int(np.argmax(counts))]
            weight = (q @ corpus[found].T).clip(min=0) * positive
            rag.append(unit(0.5 * q + 0.5 * weight @ corpus[found] / max(weight.sum(), 1e-12)))
            negatives = corpus[found][~positive]
            contrast = corpus[found][positive].mean(0) - (negatives.mean(0) if len(negatives) else 0)
            steered.append(unit(q + alpha * contrast))
        assert_scores(bench, one(result, f"rag{suffix}"), np.array(rag) @ classes.T)
        assert_scores(bench, one(result, f"clip_steering{suffix}"), np.array(steered) @ classes.T)
    votes = [
        np.bincount(guess[found], weights=q @ corpus[found].T, minlength=3)
        for q, found in zip(query, nearest, strict=True)
    ]
    assert_scores(bench, one(result, "knn_vote"), np.array(votes))

    view = bench.rows("clip", "colours", "test", view=1).tensor().numpy()
    assert not np.allclose(view, test)
    assert_scores(bench, one(result, "ens_aug"), unit(query + embed(view)) @ classes.T)

    sae = bench.sae("clip", bench.spec(one(result, "vs2", seed=1).cell))
    with torch.no_grad():
        codes = np.zeros((len(train), sae.config.num_latents))
        values, indices = sae.encode(torch.as_tensor(train))
        np.put_along_axis(codes, indices.numpy(), values.numpy(), axis=1)
        steps = [sae.decode(*sae.encode(torch.as_tensor(x))).numpy() - sae.b_pre.numpy() for x in (test, view)]
    steered = sum(embed(keep_norm(x + alpha * step, x)) for x, step in zip((test, view), steps, strict=True))
    assert_scores(bench, one(result, "vs2_ens_aug", seed=1), unit(steered) @ classes.T)

    logits = bench.encoder("clip").clip.logit_scale.exp().item() * corpus @ classes.T
    sure = np.exp(logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(len(train)), true]
    prototypes = []
    for label in range(3):
        members = np.flatnonzero(true == label)
        prototypes.append(codes[members[np.argsort(-sure[members])[:10]]].mean(0) @ sae.W_dec.detach().numpy())
    target = bench.labels("clip", "colours").numpy()
    assert_scores(
        bench,
        one(result, "oracle_prototypes", seed=1),
        embed(keep_norm(test + alpha * np.array(prototypes)[target], test)) @ classes.T,
    )

    (cosines,) = result.select("agreement", dataset="colours")
    place = cosines.figures["names"].index("seed 1"), cosines.figures["names"].index("centroid")
    direction = test - train.mean(0)
    expected = (unit(steps[0]) * unit(direction)).sum(1).mean()
    assert cosines.figures["cosine"][place[0]][place[1]] == pytest.approx(expected, abs=1e-4)


def test_reports_hold_the_numbers_behind_the_figures(study):
    """A curve that exists only as a picture can be neither checked nor compared."""
    config, result = study
    found = json.loads((Path(config.output_dir) / "reports.json").read_text())
    entries = [entry for entry in found if entry["dataset"] == "colours" and entry.get("seed") == 0]
    assert {tuple(entry["trained_on"]) for entry in entries} == {("colours",), ("colours", "half")}
    for entry in entries:
        params = {} if len(entry["trained_on"]) == 1 else {"trained_on": entry["trained_on"]}
        (cell,) = [
            cell
            for cell in result.select(dataset="colours", method="vs2", seed=0, prompts=entry["prompts"], **params)
            if ("trained_on" in cell.cell.params) == bool(params) and {"table", "gate_shift"} & set(cell.sections)
        ]
        deciles, curve = entry["fvu_deciles"], entry["risk_coverage"]
        assert sum(one["n"] * one["steered"] for one in deciles) / 24 == pytest.approx(cell.figures["top1"], abs=1e-3)
        assert curve["gated_accuracy"][-1] == pytest.approx(cell.figures["top1"], abs=1e-3)
        assert curve["gated_accuracy"][0] == pytest.approx(
            one(result, "clip", entry["prompts"]).figures["top1"], abs=1e-3
        )
        assert [one["name"] for one in entry["per_class"]] == ["blue", "green", "red"]
        assert curve["threshold"][0] is None and curve["steered_risk"][0] is None
    (seeds,) = [
        entry for entry in found if entry["dataset"] == "colours" and entry["prompts"] == "single" and "seeds" in entry
    ]
    assert seeds["agreement"]["pairs"] == 1


@pytest.mark.parametrize("rule", ["majority", "query"])
def test_the_study_and_the_wrapper_have_one_vs2pp(rule, study):
    """The figures of VS2++ must be those of the model that a user gets with the same corpus."""
    config, result = study
    bench = Bench(config, progress=False)
    row = one(result, {"majority": "vs2++", "query": "vs2++query"}[rule], prompts="published", seed=1)
    model = bench.model(row.cell)
    model.set_corpus(RetrievalCorpus.from_store(bench.rows("clip", "colours", "train"), clip=model.clip))
    model.set_steering(method="vs2++", num_neighbors=5, positives=rule)
    classes = bench.classes(row.cell)
    with torch.no_grad():
        rows = bench.rows("clip", "colours", "test").tensor()
        features = model.image_features_from_cls(rows, class_embeds=classes).features
    scores = normalize(features, dim=-1) @ classes.T
    theirs = scores.gather(1, row.outputs().predictions.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(theirs, scores.max(-1).values, rtol=0, atol=1e-4)  # the same choice, up to near ties


def test_neighbors_of_another_encoder(study, tmp_path, clip_path, images_path):
    """The paper's neighbours are DINOv2's. With the CLIP itself in that place, they are its own, and found once."""
    config, result = study
    changed = description(clip_path, images_path, tmp_path) | {"methods": ["vs2++"], "seeds": [1]}
    changed |= {"ablations": {"num_neighbors": [3]}, "retrieval": {"num_neighbors": 5, "encoder": str(clip_path)}}
    changed |= {"datasets": changed["datasets"][:1], "gate_shift": None, "grid": None, "prompts": ["single"]}
    other = run_study(StudyConfig.from_dict(changed), progress=False)
    for number in (3, 5):
        (found,) = other.select(method="vs2++", num_neighbors=number)
        (own,) = result.select(method="vs2++", num_neighbors=number, dataset="colours", prompts="single", seed=1)
        same = found.outputs().predictions == own.outputs().predictions
        assert same.double().mean() > 0.9, "the same neighbours, up to near ties"
    assert len(list((tmp_path / "retrieval").iterdir())) == 2, "one file a split"


def test_table_and_command_line(capsys, tmp_path, clip_path, images_path):
    """`hf-vs2 study` prints the table, says what it wrote, draws the figures, and finds what is measured."""
    whole = description(clip_path, images_path, Path("elsewhere")) | {"methods": ["clip", "vs2"], "seeds": [0]}
    whole |= {"ablations": {}, "grid": None, "gate_shift": None, "agreement": False, "prompts": ["single"]}
    file, folder = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(whole))
    out = run(capsys, "study", file, "--output_dir", folder, "--datasets", "colours", "--disable_tqdm")
    assert "| VS2 |" in out and "results.json" in out and "figures" in out
    assert " ".join((folder / "table.md").read_text().split()) in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines() if not line.startswith(("|", "  ")))
    for figure in ("png", "svg"):
        assert list((folder / "figures").glob(f"*.{figure}"))
    assert json.loads((folder / "results.json").read_text())["meta"]["defaults"]["gamma"] == 2.0
    measured = {path: path.stat().st_mtime_ns for path in (folder / CELLS).iterdir()}
    run(capsys, "study", file, "--output_dir", folder, "--datasets", "colours", "--disable_tqdm", "--no_figures")
    assert {path: path.stat().st_mtime_ns for path in (folder / CELLS).iterdir()} == measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encodrs": []}, "did you mean 'encoders'"),
        ({"datasets": []}, "does not say its datasets"),
        ({"methods": ["vs3"]}, "did you mean 'vs2'"),
        ({"prompts": ["all"]}, "'all' is not known"),
        ({"seeds": [1, 1]}, "1 occurs twice"),
        ({"sae": {"top_k": 4, "steps": 3}}, "'steps'; did you mean 'max_steps'"),
        ({"sae": {"max_steps": 0}}, "sae.max_steps must be a whole number from 1"),
        ({"sae": {"top_k": "x"}}, "sae.top_k must be a whole number"),
        ({"sae": {"expansion_factor": None}}, "sae.expansion_factor must be a whole number"),
        ({"sae": {"max_steps": 3, "num_train_epochs": 3}}, "both say how long"),
        ({"steering": {"gate": 2.0}}, "steering.gate must be .*positive and below 1.*, not 2.0"),
        ({"steering": {"lambda": [1, 2]}}, "steering.lambda_ must be a finite number"),
        ({"steering": {"fvu_threshold": 1.0}}, "steering has no setting 'fvu_threshold'"),
        ({"ablations": {"share": [0]}}, r"ablations.share\[0\] must be .*positive and at most 1"),
        ({"ablations": {"share": [math.nan]}}, r"ablations.share\[0\] must be .*not nan"),
        ({"retrieval": {"num_neighbors": 0}}, "retrieval.num_neighbors must be a whole number from 1"),
        ({"inner_layers": {"test_limit": -1}}, "inner_layers.test_limit must be a whole number from 1"),
        ({"gate_shift": {"trained_on": []}}, "gate_shift.trained_on must have at least 1 value"),
        ({"seeds": [2**70]}, r"seeds\[0\] must be a whole number from 0"),
        ({"seeds": [True]}, r"seeds\[0\] must be a whole number"),
        ({"views": 1e9}, "views must be a whole number from 0 to 1,000"),
        ({"cost": "maybe"}, "cost must be true or false, not 'maybe'"),
        ({"output_dir": ["x"]}, "output_dir must be a text"),
        ({"datasets": [[1]]}, r"datasets\[0\] must be a name"),
        ({"encoders": [{"id": "a/b", "name": "../../x"}]}, r"encoders\[0\].name must be a name that files can have"),
        ({"encoders": ["a/.."]}, "the name of encoder 'a/..' must be a name that files can have"),
        ({"datasets": [{"name": "/abs", "path": "x"}]}, r"datasets\[0\].name must be a name that files can have"),
        ({"methods": []}, "methods must have at least 1 value"),
        ({"gate_shift": {"trained_on": ["cifar"]}}, "'cifar' is not known"),
        ({"grid": {"gamma": [1.5]}}, "grid lacks lambda"),
    ],
)
def test_a_mistake_in_the_file_is_named(change, message, tmp_path, clip_path, images_path):
    """Before anything is extracted."""
    with pytest.raises(ValueError, match=message):
        StudyConfig.from_dict(description(clip_path, images_path, tmp_path) | change)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "examples" / "studies").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_studies_that_we_ship_can_be_planned(path):
    """Nobody should find a spelling mistake in our own file after a day of downloads."""
    config = StudyConfig.from_yaml(path)
    cells = plan(config)
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.method for cell in cells} >= set(METHODS)


def test_names_that_are_one_to_the_encoder_are_refused_before_images_are_read(tmp_path, clip_path, images_path):
    """The tokenizer reads `Red` and `red` alike: half of their images would never be answered rightly."""
    root = tmp_path / "images"
    for split in ("train", "test"):
        for name, folder in zip(("Red", "red"), sorted((images_path / split).iterdir()), strict=False):
            shutil.copytree(folder, root / split / name)
    whole = description(clip_path, root, tmp_path / "out") | {"methods": ["clip"], "gate_shift": None, "ablations": {}}
    with pytest.raises(ValueError, match="'Red' and 'red' are one to this CLIP"):
        run_study(StudyConfig.from_dict(whole), progress=False)
    assert not (tmp_path / "out" / "activations").exists()


@pytest.mark.parametrize("splits", ["train and test", "train"])
def test_images_without_labels(tmp_path, clip_path, images_path, splits):
    """Accuracy needs them; unlabelled training images are what VS2 is for: only PASS and the oracles need more, and that is
    said at once."""
    root = tmp_path / "flat"
    for split in splits.split(" and "):
        (root / split).mkdir(parents=True)
        for number, path in enumerate(sorted((images_path / split).rglob("*.png"))):
            (root / split / f"{number}.png").write_bytes(path.read_bytes())
    whole = description(clip_path, root, tmp_path / "out") | {"gate_shift": None, "ablations": {}, "agreement": False}
    whole["datasets"] = [{"name": "flat", "path": str(root)} | ({"test_split": "train"} if splits == "train" else {})]
    config = StudyConfig.from_dict(whole)
    if splits != "train":
        with pytest.raises(ValueError, match="flat.*has no column 'label'"):
            run_study(replace(config, methods=("clip",)), progress=False)
        return
    bench = Bench(config, progress=False)
    with pytest.raises(ValueError, match="no column 'label'.*oracle_prototypes.*vs2_pass"):
        _check_labels(bench, plan(config))
    free = tuple(name for name, method in METHODS.items() if not method.uses_labels)
    _check_labels(bench, plan(replace(config, methods=free)))


def test_augmented_views_depend_on_the_image_and_the_number_alone(images_path):
    """Another order, or another process, must not make other views; nor may the cache mix views up."""
    images = [row["image"] for row in load_images(images_path, "test").cast_column("image", _decoded())]
    first, second = AugmentedView(None, 1), AugmentedView(None, 2)
    once = [first.crop(image) for image in images]
    again = [first.crop(image) for image in reversed(images)][::-1]
    assert [view.tobytes() for view in once] == [view.tobytes() for view in again]
    assert once[0].tobytes() != second.crop(images[0]).tobytes()
    areas = torch.tensor([view.width * view.height / (32 * 32) for view in once])
    assert (areas > 0.4).all() and (areas <= 1).all() and areas.std() > 0.05


def _decoded():
    from datasets import Image

    return Image(decode=True)


def test_cells_and_results_of_earlier_versions_are_read(tmp_path):
    """Measuring a study again costs days; a method that is spelled otherwise now is the same method."""
    outputs = Outputs(torch.tensor([0, 1]), torch.tensor([0, 0]))
    old = Cell("clip", "colours", "vs2_gate", "single", 0, {"gamma": 1.5, "gate": 0.9})
    save_cell(tmp_path, old, {"top1": 50.0}, outputs)
    found = load_cell(tmp_path, replace(old, method="vs2+gate"))
    assert found.cell.method == "vs2+gate" and torch.equal(found.outputs().predictions, outputs.predictions)
    assert load_cell(tmp_path, replace(old, method="vs2")) is None
    meta = {"methods": {"vs2_gate": {"label": "VS2, gated", "uses_labels": ""}}}
    StudyResult(meta, [CellResult(old, {"top1": 50.0})]).to_json(tmp_path / "results.json")
    read = StudyResult.from_json(tmp_path / "results.json")
    assert [one.cell.method for one in read] == list(read.meta["methods"]) == ["vs2+gate"]


def test_one_data_set_alone_keeps_the_cells_of_the_others(tmp_path, clip_path, images_path):
    """`--datasets` shares the work between machines: the last to end must not throw away what the others measured."""
    whole = description(clip_path, images_path, tmp_path) | {"methods": ["clip", "centroid"], "seeds": [0]}
    whole |= {"gate_shift": None, "ablations": {}, "agreement": False, "grid": None, "cost": False}
    config = StudyConfig.from_dict(whole)
    names = [one.name for one in config.datasets]
    run_study(config, datasets=names[:1], progress=False)
    result = run_study(config, datasets=names[1:], progress=False)
    assert list(result.meta["datasets"]) == names and {one.cell.dataset for one in result} == set(names)
    assert [one.cell.identity for one in result] == [one.cell.identity for one in run_study(config, progress=False)]
