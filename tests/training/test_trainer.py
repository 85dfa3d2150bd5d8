"""Training learns, is reproducible to the last bit, survives a kill, and leaves a checkpoint that needs nothing else."""

import json
import math
import os
import sys
import threading
import warnings
from functools import partial

import pytest
import torch
from recorders import Recorder
from toy import sparse_rows
from trainings import HIDDEN, assert_close_weights, assert_same_weights, make_store, make_trainer

from hf_vs2 import SAEConfig, SAEModel, SAETrainingArguments
from hf_vs2.data.ahead import THREAD_NAME
from hf_vs2.data.stores.rows import rows_of
from hf_vs2.functional.label_free import row_distance
from hf_vs2.sae import modeling as modeling_sae
from hf_vs2.training.batches import BatchPlan
from hf_vs2.training.calibration import activation_statistics


@pytest.fixture(scope="module")
def rows():
    """Data that a top-k SAE can explain and PCA can't."""
    return sparse_rows(2000)


# Does it learn


def test_it_learns_what_pca_cannot(rows, tmp_path):
    """The point of an SAE: with 3 active latents it explains far more of sparse data than the 3 best directions do."""
    trainer = make_trainer(tmp_path, rows, max_steps=500, logging_steps=100)
    untrained = SAEModel(trainer.model.config)
    untrained.set_statistics(*activation_statistics(rows_of(rows), trainer.train_indices))
    metrics = trainer.train()

    train, fresh = rows[trainer.train_indices], sparse_rows(1000, seed=1)
    centred = fresh - train.mean(0)
    directions = torch.linalg.svd((train - train.mean(0)), full_matrices=False).Vh[:3]
    pca_fvu = ((centred - centred @ directions.T @ directions).square().sum() / centred.square().sum()).item()

    def fvu(sae):
        with torch.no_grad():
            return ((fresh - sae(fresh).reconstruction).square().sum() / centred.square().sum()).item()

    assert fvu(trainer.model) < 0.6 * pca_fvu
    assert fvu(trainer.model) < 0.6 * fvu(untrained)
    assert metrics["fvu"] == pytest.approx(fvu(trainer.model), abs=0.03), "held-out rows and fresh rows are alike"
    assert metrics["dead_share"] < 0.1
    log = json.loads((tmp_path / "training_log.json").read_text())["log"]
    assert [entry["step"] for entry in log] == [100, 200, 300, 400, 500]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    torch.testing.assert_close(trainer.model.W_dec.norm(dim=-1), torch.ones(96))


def test_the_checkpoint_needs_nothing_else(rows, tmp_path):
    """Only the folder goes to the Hub: mean, variance, quantiles, provenance and metrics are all in it."""
    trainer = make_trainer(tmp_path / "run", rows)
    metrics = trainer.train()
    (tmp_path / "moved").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "run" / name).rename(tmp_path / "moved" / name)
    sae = SAEModel.from_pretrained(tmp_path / "moved")
    assert_same_weights(trainer.model, sae)
    train = rows[trainer.train_indices].double()
    torch.testing.assert_close(sae.mean.double(), train.mean(0))
    assert sae.config.total_variance == pytest.approx(train.var(0, correction=0).sum().item(), rel=1e-9)
    assert sae.config.num_calibration_rows == len(trainer.held_out_indices) == 200
    assert sae.fvu_threshold(0.99) > sae.fvu_threshold(0.5) > 0
    assert sae.config.training_data == {"num_rows": 2000, "seed": 42}
    assert sae.config.training_metrics["fvu"] == metrics["fvu"] and sae.config.hf_vs2_version

    log = json.loads((tmp_path / "run" / "training_log.json").read_text())
    assert log["metrics"] == metrics and log["args"]["learning_rate"] == 3e-3
    assert metrics.keys() >= {"fvu", "l0", "dead_share", "steps", "train_rows", "held_out_rows", "seconds"}
    assert log["log"][-1].keys() >= {"step", "loss", "fvu", "dead_share", "learning_rate"}
    left = {path.name for path in (tmp_path / "run").iterdir()} - {"README.md", ".training.lock"}
    # Statistics for methods beyond VS2, and a file that says to transformers what to install.
    assert left == {"training_log.json", "statistics.safetensors", "hf_vs2_shim.py"}


def test_statistics_are_of_the_rows_of(rows, tmp_path):
    """Statistics of rows that the thresholds are measured on would make the gate by distance too loose."""
    trainer = make_trainer(tmp_path, rows, sketch_rows=100)
    trainer.train()
    known = SAEModel.from_pretrained(tmp_path).domain_statistics
    train = rows[trainer.train_indices]
    torch.testing.assert_close(known.mean, train.mean(0), rtol=1e-4, atol=1e-5)
    assert known.num_rows == len(train) and len(known.rows) == 100
    assert (known.rows.unsqueeze(1) == train.bfloat16()).all(-1).any(-1).all()
    fresh = row_distance(rows[trainer.held_out_indices], known.of_rows)
    assert (fresh <= known.distance_threshold(0.9)).float().mean() == pytest.approx(0.9, abs=0.01)
    dense = torch.zeros(len(train), 96).scatter_(1, *reversed(trainer.model.encode(train)))
    torch.testing.assert_close(known.latent_mean, dense.mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("arguments", "layer"), [({"sketch_rows": 0}, 2), ({}, 0)], ids=["not asked", "inner layer"])
def test_a_checkpoint_without_statistics(rows, tmp_path, arguments, layer):
    """Who must not give away activations turns them off; an inner layer's rows are nothing that scores come from."""
    store = make_store(tmp_path / "store", rows, layer=layer)
    trainer = make_trainer(tmp_path / "sae", store, **arguments)
    trainer.train()
    assert trainer.model.config.layer == layer and not (tmp_path / "sae" / "statistics.safetensors").exists()
    assert SAEModel.from_pretrained(tmp_path / "sae").domain_statistics is None


# The same again


def test_seeds_reproduce_bit_for_bit(rows, tmp_path):
    """The same seed gives the same file; another seed, another SAE."""
    first, again, other = (make_trainer(tmp_path / str(i), rows, seed=seed) for i, seed in enumerate((1, 1, 2)))
    for trainer in (first, again, other):
        torch.randn(3)  # what ran before in the process must not matter
        trainer.train()
    assert_same_weights(first.model, again.model)
    assert first.model.config.fvu_quantiles == again.model.config.fvu_quantiles
    assert not torch.equal(first.model.W_dec, other.model.W_dec)


def test_a_script_that_is_run_again_goes_on_with_the_trained_model(rows, tmp_path):
    """`SAETrainer(sae, ...).train(); use(sae)`: the second run finds the training finished, and `sae` must be it."""
    for _ in range(2):
        torch.manual_seed(1)
        sae = SAEModel(SAEConfig(hidden_size=HIDDEN, num_latents=96, top_k=3))
        make_trainer(tmp_path, rows, model=sae).train(resume_from_checkpoint=None)
        saved = SAEModel.from_pretrained(tmp_path)
        assert torch.equal(sae.W_enc, saved.W_enc) and sae.config.fvu_quantiles == saved.config.fvu_quantiles
        assert torch.equal(sae.domain_statistics.mean, saved.domain_statistics.mean)


def test_a_finished_training_is_not_that_of_other_rows_or_settings(rows, tmp_path, caplog):
    """An SAE of other rows must not pass for one of these; steering defaults stay as they were saved, and that is said."""
    make_trainer(tmp_path, rows).train()
    with pytest.raises(ValueError, match="another training .it was trained with some_rows="):
        make_trainer(tmp_path, -rows).train()
    assert SAETrainingArguments(output_dir=tmp_path).output_dir == str(tmp_path)  # which is written as JSON
    asked = make_trainer(tmp_path, rows, config={"gamma": 3.0})
    asked.train()
    assert "Its gamma stays 1.5, not 3.0" in caplog.text and asked.model.config.gamma == 1.5


def test_a_trainer_does_not_train_its_model_twice(rows, tmp_path, monkeypatch):
    """A cell of a notebook that was stopped and is run again would train on from where it was, under a record that says
    otherwise."""
    trainer = make_trainer(tmp_path, rows)
    with monkeypatch.context() as patch:
        patch.setattr("hf_vs2.training.trainer.SAETrainer._calibrate", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
    with pytest.raises(RuntimeError, match="has trained its model already.* make it again"):
        trainer.train()


def test_one_config_can_be_used_twice(rows, tmp_path):
    """A loop over seeds or data sets shares the config: the second run must not inherit the first one's statistics."""
    config = SAEConfig(hidden_size=HIDDEN, num_latents=96, top_k=3)
    before = config.to_dict()
    make_trainer(tmp_path / "first", 10 + rows, model=config).train()
    assert config.to_dict() == before
    trained = SAEModel.from_pretrained(tmp_path / "first").config
    again = make_trainer(tmp_path / "again", rows, model=trained)
    again.train()
    torch.testing.assert_close(again.model.mean, rows[again.train_indices].mean(0))
    fresh = make_trainer(tmp_path / "fresh", rows)
    fresh.train()
    assert_same_weights(fresh.model, again.model)


def test_gradient_accumulation_equals_the_larger_batch(rows, tmp_path):
    """What people use when the batch does not fit: the same SAE up to float error, the same dead latents. Both trainers are
    made first, as in a notebook: accelerate shares the number of accumulation steps between them."""
    whole = make_trainer(tmp_path / "whole", rows, per_device_train_batch_size=96)
    parts = make_trainer(tmp_path / "parts", rows, per_device_train_batch_size=32, gradient_accumulation_steps=3)
    metrics = whole.train(), parts.train()
    assert_close_weights(whole.model, parts.model)
    assert metrics[0]["dead_share"] == metrics[1]["dead_share"]
    logs = [json.loads((tmp_path / name / "training_log.json").read_text())["log"] for name in ("whole", "parts")]
    for one, other in zip(*logs, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_every_row_comes_once_an_epoch():
    """A batch plan that skips or repeats rows trains on other data than it says."""
    rows = torch.arange(100, 137)
    plan = BatchPlan(rows, batch_size=8, seed=3)
    drawn = torch.cat([plan[number] for number in range(37)])  # 8 epochs
    for epoch in drawn.view(8, 37):
        assert torch.equal(epoch.sort().values, rows)
    assert not torch.equal(drawn[:37], drawn[37:74]), "each epoch in its own order"
    assert torch.equal(BatchPlan(rows, 8, seed=3)[20], plan[20]), (
        "a function of the number alone: resuming needs no state"
    )
    assert not torch.equal(BatchPlan(rows, 8, seed=4)[20], plan[20])
    halves = BatchPlan(rows, batch_size=4, seed=3)
    assert torch.equal(torch.cat([halves[10], halves[11]]), plan[5]), "the order does not depend on the batch size"
    larger_than_an_epoch = BatchPlan(rows, batch_size=100, seed=3)[0]
    assert set((larger_than_an_epoch - 100).bincount().tolist()) == {2, 3}


def test_the_number_of_steps():
    """`num_train_epochs` and `max_steps` as everywhere in transformers; without either, enough for a small set too."""

    def steps(**arguments):
        return SAETrainingArguments(output_dir="x", **arguments).num_steps(10_000, 500)

    assert steps(max_steps=7) == 7
    assert steps(num_train_epochs=3) == 60
    assert steps(num_train_epochs=0.5) == 10
    assert steps() == 1500
    assert SAETrainingArguments(output_dir="x").num_steps(1_000_000, 500) == 10_000


# Resuming


def test_checkpoints_that_are_not_there(rows, tmp_path):
    """A typo in the path, or `latest` in a new folder, must not start from scratch in silence."""
    for wanted, message in (
        ("latest", "holds no checkpoint-"),
        (str(tmp_path / "checkpoint-7"), "there is no such folder"),
        (str(tmp_path), "is no training checkpoint: it has no trainer_state.json"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, rows, resume_from_checkpoint=wanted).train()


@pytest.mark.parametrize(("limit", "left"), [(1, {"16", "900", "best"}), (2, {"12", "16", "900", "best"})])
def test_old_checkpoints_go_and_the_new_one_stays(rows, tmp_path, limit, left):
    """`save_total_limit` bounds the disk; folders of the user's stay."""
    for name in ("checkpoint-best", "checkpoint-900"):
        (tmp_path / name).mkdir()
    make_trainer(tmp_path, rows, save_steps=4, save_total_limit=limit).train()
    assert {path.name.removeprefix("checkpoint-") for path in tmp_path.glob("checkpoint-*")} == left


# A part of the rows, rows of several stores


def test_indices_train_on_those_rows_alone(rows, tmp_path):
    """How accuracy falls with fewer images: no other row may reach the weights, the mean or the thresholds, in any order."""
    chosen = torch.randperm(2000, generator=torch.Generator().manual_seed(3))[:400]
    spoilt = torch.full_like(rows, float("nan"))
    spoilt[chosen] = rows[chosen]
    trainer = make_trainer(tmp_path / "chosen", spoilt, indices=chosen)
    metrics = trainer.train()
    alone = make_trainer(tmp_path / "alone", rows[chosen.sort().values])
    alone.train()
    assert_same_weights(trainer.model, alone.model)
    assert trainer.model.config.fvu_quantiles == alone.model.config.fvu_quantiles
    used = torch.cat([trainer.train_indices, trainer.held_out_indices])
    assert torch.equal(used.sort().values, chosen.sort().values) and metrics["held_out_rows"] == 80
    assert trainer.model.config.training_data == {"num_rows": 400, "seed": 42, "selected_from": 2000}
    whole = make_trainer(tmp_path / "whole", rows, indices=range(2000))
    assert whole.model.config.training_data == {"num_rows": 2000, "seed": 42}


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([3, 4, 3], "indices names a row twice"),
        ([0, 2000], r"indices must lie in \[0, 2000\).*reach from 0 to 2000"),
        ([-1, 5], r"indices must lie in \[0, 2000\).*reach from -1 to 5"),
        (torch.ones(2000, dtype=torch.bool), "indices must be a vector of row numbers, not torch.bool"),
        ([[1, 2]], r"not torch.int64 of shape \(1, 2\)"),
        ([7], "1 activation rows are too few"),
    ],
)
def test_impossible_indices_are_refused(rows, tmp_path, indices, message):
    """A mask taken for numbers trains on rows 0 and 1; a row given twice calibrates on what was trained on."""
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows, indices=indices)


def test_several_stores_are_one_set(rows, tmp_path):
    """One SAE for several data sets (the paper's table 3): as if their rows were in one store, and each is on record."""
    stores = [
        make_store(tmp_path / "birds", rows[:1500]),
        make_store(tmp_path / "cars", rows[1500:], class_names=["a"]),
    ]
    indices = torch.arange(0, 2000, 2)
    union = make_trainer(tmp_path / "union", stores, indices=indices)
    union.train()
    whole = make_trainer(tmp_path / "whole", rows, indices=indices)
    whole.train()
    assert_same_weights(union.model, whole.model)
    config = SAEModel.from_pretrained(tmp_path / "union").config
    assert (config.base_model_name_or_path, config.base_model_revision, config.layer) == ("someone/clip", "c0ffee", 2)
    facts = {"split": "train", "skipped": 0}
    assert config.training_data == {
        "num_rows": 1000,
        "seed": 42,
        "selected_from": 2000,
        "parts": [
            {"num_rows": 750, "id": "someone/birds", "fingerprint": "birds", **facts},
            {"num_rows": 250, "id": "someone/cars", "fingerprint": "cars", **facts},
        ],
    }
    order = torch.tensor([1999, 0, 1500, 1499, 0, 700])
    assert torch.equal(union.rows.take(order), rows[order])
    one = make_trainer(tmp_path / "one", stores[:1])
    assert one.model.config.training_data["fingerprint"] == "birds", "a list of one store is that store"


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"model": {"id": "b", "revision": None, "fingerprint": "cd34"}}, "model.fingerprint: 'ab12' != 'cd34'"),
        ({"preprocessing": {"size": {"shortest_edge": 64}}}, "preprocessing.size.shortest_edge: 32 != 64"),
        ({"layer": 1}, "layer: 2 != 1"),
        ({"hidden_size": 32}, "hidden_size: 24 != 32"),
    ],
)
def test_stores_of_different_origin_are_not_mixed(rows, tmp_path, changed, difference):
    """Rows of two CLIPs or two layers have nothing to do with each other; the message names both stores and what differs."""
    others = torch.zeros(40, changed.get("hidden_size", HIDDEN))
    stores = [make_store(tmp_path / "one", rows[:50]), make_store(tmp_path / "other", others, **changed)]
    with pytest.raises(ValueError, match="one and .*other can't be taken together: ") as error:
        make_trainer(tmp_path / "sae", stores)
    assert difference in str(error.value)


@pytest.mark.parametrize("train_rows", [[], [torch.zeros(9, HIDDEN)]])
def test_lists_of_anything_else_are_refused(train_rows, tmp_path):
    """A list of tensors is easily passed; it must not end in an AttributeError."""
    with pytest.raises(TypeError, match="must be a tensor .* or a list of stores"):
        make_trainer(tmp_path, train_rows)


# Going on, precision, trackers


def test_going_on_from_a_trained_sae(rows, tmp_path):
    """Fine-tuning on a new domain: weights and `b_pre` go on, mean and quantiles become the new domain's."""
    make_trainer(tmp_path / "first", rows, max_steps=100).train()
    sae = SAEModel.from_pretrained(tmp_path / "first")
    start, old = sae.b_pre.detach().clone(), dict(sae.config.fvu_quantiles)
    trainer = make_trainer(tmp_path / "second", rows + 0.5, model=sae, max_steps=2, learning_rate=1e-6)
    trainer.train()
    assert trainer.model is sae
    torch.testing.assert_close(sae.b_pre.detach(), start, atol=1e-4, rtol=0)
    torch.testing.assert_close(sae.mean, (rows + 0.5)[trainer.train_indices].mean(0))
    assert sae.config.fvu_quantiles != old


def test_tensorboard_gets_the_log(rows, tmp_path):
    """`--report_to tensorboard` writes the curves that people watch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    make_trainer(tmp_path, rows, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "hf_vs2")).Reload()
    assert {"loss", "fvu", "dead_share", "learning_rate"} <= set(events.Tags()["scalars"])
    log = json.loads((tmp_path / "training_log.json").read_text())["log"]
    assert [(event.step, event.value) for event in events.Scalars("fvu")] == [
        (entry["step"], pytest.approx(entry["fvu"], rel=1e-6)) for entry in log
    ]


def test_the_learning_rate_rises_and_falls(rows, tmp_path):
    """Linear warm-up and decay to zero: a schedule stepped once too often a batch ends half-way."""
    make_trainer(tmp_path, rows, warmup_ratio=0.25, logging_steps=1, gradient_accumulation_steps=2).train()
    log = json.loads((tmp_path / "training_log.json").read_text())["log"]
    rates = [entry["learning_rate"] / 3e-3 for entry in log]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0] + [1 - i / 15 for i in range(1, 16)], abs=1e-6)


@pytest.mark.parametrize(("max_grad_norm", "moves"), [(1e-11, False), (0.0, True)])
def test_gradients_are_clipped(rows, tmp_path, max_grad_norm, moves):
    """Clipped to next to nothing, far below Adam's epsilon, no weight moves; 0 means no clipping."""
    sae = SAEModel(SAEConfig(hidden_size=HIDDEN, num_latents=96, top_k=3))
    before = sae.W_dec.detach().clone()
    make_trainer(tmp_path, rows, model=sae, max_grad_norm=max_grad_norm).train()
    assert ((sae.W_dec - before).abs().max() > 1e-3) == moves


def test_the_dead_share_counts_steps_without_activity(rows, tmp_path):
    """AuxK and the log hang on this counter: a latent is dead after `dead_latent_threshold` steps, not before."""
    sae = SAEModel(SAEConfig(hidden_size=HIDDEN, num_latents=96, top_k=3, aux_k_coefficient=0.0))
    with torch.no_grad():
        sae.b_enc[:24] = -100
    make_trainer(tmp_path, rows, model=sae, logging_steps=1, dead_latent_threshold=12).train()
    shares = [entry["dead_share"] for entry in json.loads((tmp_path / "training_log.json").read_text())["log"]]
    assert shares[:11] == [0.0] * 11 and shares[11] == pytest.approx(0.25, abs=0.05)


# What can't be trained


def test_a_diverging_run_stops(rows, tmp_path):
    """A learning rate of 1e30 must end in a message and without a checkpoint, not in a folder of NaN."""
    with pytest.raises(ValueError, match=r"The loss is (nan|inf) at step \d+. Lower learning_rate"):
        make_trainer(tmp_path, rows, learning_rate=1e30, max_grad_norm=0).train()
    assert not (tmp_path / "config.json").exists()


def test_without_held_out_rows_there_is_no_gate(rows, tmp_path, caplog):
    """`calibration_share=0` uses every row; a gate from an earlier training must not survive it."""
    trainer = make_trainer(tmp_path, rows, config={"fvu_quantiles": {"0.99": 0.5}}, calibration_share=0.0)
    metrics = trainer.train()
    assert len(trainer.train_indices) == 2000 and "fvu" not in metrics
    assert trainer.model.config.fvu_quantiles is None
    assert "no rows were held out, so the SAE has no gate" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_steps": 5, "num_train_epochs": 1}, "max_steps and num_train_epochs both say how long"),
        ({"max_steps": 0}, "max_steps must be a whole number from 1 to .*, not 0"),
        ({"max_steps": 1.5}, "max_steps must be a whole number .*, not 1.5"),
        ({"num_train_epochs": math.inf}, "num_train_epochs must be a finite number .*positive.*, not inf"),
        ({"learning_rate": -1.0}, "learning_rate must be a finite number .*positive.*, not -1.0"),
        ({"learning_rate": "5e-4"}, "learning_rate must be a finite number .*, not '5e-4'"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number from 1"),
        (
            {"per_device_train_batch_size": 2**31},
            "per_device_train_batch_size must be a whole number from 1 to 1,048,576",
        ),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number from 1"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be a finite number .at least 0 and below 1., not 1.0"),
        ({"calibration_share": -0.1}, "calibration_share must be a finite number .at least 0 and below 1., not -0.1"),
        ({"save_total_limit": math.nan}, "save_total_limit must be a whole number from 1"),
        ({"save_steps": -1}, "save_steps must be a whole number from 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be a number .at least 0., not -1.0"),
        ({"max_grad_norm": 10**400}, "max_grad_norm must be a number .*, not a number of more than 30 digits"),
        ({"seed": -1}, "seed must be a whole number from 0 to 4,294,967,295, not -1"),
        ({"seed": True}, "seed must be a whole number .*, not True"),
        ({"mixed_precision": "bf-16"}, "mixed_precision='bf-16' is not known; did you mean 'bf16'"),
        ({"disable_tqdm": "yes"}, "disable_tqdm must be true or false, not 'yes'"),
        ({"output_dir": None}, "output_dir must be a path, not None"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    """Before the activations are extracted, not after."""
    with pytest.raises(ValueError, match=message):
        SAETrainingArguments(**{"output_dir": "x", **arguments})


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.0}])
def test_the_host_waits_for_the_device_at_log_entries_only(rows, tmp_path, monkeypatch, settings):
    """Asked for one number a step, a GPU finishes all its work before it gets more: half its time it would stand idle."""
    monkeypatch.setattr(modeling_sae, "_counting_is_free", lambda device: False)  # take the path of a GPU

    def questions(steps, logging_steps):
        options = {"max_steps": steps, "logging_steps": logging_steps, "dead_latent_threshold": 1, **settings}
        options |= {"per_device_train_batch_size": 16, "config": {"aux_k": 20}}
        trainer = make_trainer(tmp_path / f"{steps}-{logging_steps}", rows, **options)
        trainer._set_statistics()
        with Recorder() as asked:
            progress = trainer._optimize(trainer._plan(), None)
        assert progress.log[-1]["dead_share"] > 0, "AuxK is at work"
        return len(asked.waits)

    at_one_entry = questions(10, 10)
    assert questions(30, 30) == at_one_entry > 0
    assert questions(30, 10) == 3 * at_one_entry


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what a GPU waits for is asked of CUDA itself")
def test_cuda_is_waited_for_at_log_entries_only(rows, tmp_path):
    """The same, of the kernels that a GPU runs: reading ahead into pinned memory and the sparse products included."""

    def waits(steps, logging_steps):
        options = {"max_steps": steps, "logging_steps": logging_steps, "dead_latent_threshold": 1}
        trainer = make_trainer(tmp_path / f"{steps}-{logging_steps}", rows, config={"aux_k": 20}, **options)
        trainer._set_statistics()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                trainer._optimize(trainer._plan(), None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(each.message) for each in seen)

    waits(10, 10)  # kernels are chosen and compiled
    at_one_entry = waits(10, 10)
    assert waits(30, 30) == at_one_entry > 0
    assert waits(30, 10) > at_one_entry


def readers():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


class Lost(Exception):
    """Of a disk, or of the user's own code."""


@pytest.mark.parametrize("where", ["reading", "step"])
def test_an_error_in_training_is_raised_as_it_is_and_leaves_no_thread(rows, tmp_path, where):
    """A thread left behind would keep a notebook's memory and a process from ending; a wrapped error is not what `except` is for."""
    error = Lost("row 17")

    def lose(*_):
        raise error

    trainer = make_trainer(tmp_path, rows)
    steps = iter(range(100))
    if where == "reading":
        take = trainer.rows.take
        trainer._set_statistics()
        trainer.rows.take = lambda indices: lose() if next(steps) == 7 else take(indices)
        run = partial(trainer._optimize, trainer._plan(), None)
    else:
        trainer._batch, run = lose, trainer.train
    with pytest.raises(Lost) as caught:
        run()
    assert caught.value is error and not readers()


def test_the_progress_bar_shows_what_matters(rows, tmp_path, capfd, monkeypatch):
    """People watch loss, FVU and dead share; `disable_tqdm` leaves the terminal alone."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)  # a log gets no bar
    make_trainer(tmp_path / "bar", rows, disable_tqdm=False).train()
    bar = capfd.readouterr().err
    assert "Training SAE" in bar and "20/20" in bar and all(f"{name}=" in bar for name in ("loss", "fvu", "dead"))
    make_trainer(tmp_path / "quiet", rows).train()
    assert "Training SAE" not in capfd.readouterr().err


assert os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "no", "these tests count on float32"
