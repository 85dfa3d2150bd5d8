"""Labels in training (PASS): they reach the rows that they belong to, tighten the classes, and are on record."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from toy import sparse_rows
from trainings import HIDDEN, assert_same_weights, make_store, make_trainer

from hf_vs2 import SAEConfig, SAEModel
from hf_vs2.data.stores.rows import UnionRows, rows_of
from hf_vs2.functional import prototype_alignment
from hf_vs2.training.label_losses import PrototypeAlignment


@pytest.fixture(scope="module")
def labelled():
    """`(rows, labels)`: ten classes, each with a mean of its own beside the features that all share."""
    draw = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 10, (2000,), generator=draw)
    return sparse_rows(2000) + 0.8 * torch.randn(10, HIDDEN, generator=draw)[labels], labels


def spread(trainer, rows, labels):
    """Mean squared distance of the latents to their class mean, beside that to the mean of all: 1 without any structure."""
    with torch.no_grad():
        values, indices = trainer.model.encode(rows)
    return (prototype_alignment(values, indices, labels) / prototype_alignment(values, indices, 0 * labels)).item()


def test_prototype_alignment_tightens_the_classes(labelled, tmp_path):
    """What PASS is for, and its price: on rows held out, latents of a class come closer to each other in proportion to all
    latents, which mere shrinking would not do; and the FVU rises. The checkpoint says that labels were used."""
    rows, labels = labelled
    setting = {"max_steps": 200, "config": {"top_k": 8}}
    plain = make_trainer(tmp_path / "plain", rows, **setting)
    tight = make_trainer(tmp_path / "tight", rows, labels=labels, label_loss=PrototypeAlignment(3.0), **setting)
    fvu, tight_fvu = plain.train()["fvu"], tight.train()["fvu"]
    held_out = rows[plain.held_out_indices], labels[plain.held_out_indices]
    assert spread(tight, *held_out) < 0.8 * spread(plain, *held_out)
    assert tight_fvu > 1.2 * fvu
    recorded = SAEConfig.from_pretrained(tmp_path / "tight").training_data
    assert recorded["label_loss"] == {"name": "PrototypeAlignment", "weight": 3.0}
    assert "label_loss" not in SAEConfig.from_pretrained(tmp_path / "plain").training_data


def test_a_label_loss_has_the_units_of_the_fvu(labelled, tmp_path):
    """The weight must mean the same for rows of any scale. With the reconstruction's own error as the term, the loss that the
    log shows is twice the FVU; and a term of 0 changes no bit."""
    rows, labels = labelled

    def twice(out, labels):
        return (out.reconstruction - batches[-1][0]).square().sum(-1).mean()

    batches = []
    trainer = make_trainer(
        tmp_path / "twice", rows, labels=labels, label_loss=twice, config={"aux_k_coefficient": 0.0}
    )
    batch = trainer._batch
    trainer._batch = lambda read: batches.append(batch(read)) or batches[-1]
    trainer.train()
    for entry in json.loads((tmp_path / "twice" / "training_log.json").read_text())["log"]:
        assert entry["loss"] == pytest.approx(2 * entry["fvu"], rel=1e-5)
    assert trainer.model.config.training_data["label_loss"] == {"name": "twice"}

    plain = make_trainer(tmp_path / "plain", rows)
    nothing = make_trainer(tmp_path / "nothing", rows, labels=labels, label_loss=PrototypeAlignment(0.0))
    plain.train(), nothing.train()
    assert_same_weights(plain.model, nothing.model)


def test_labels_reach_the_rows_they_belong_to(labelled, tmp_path):
    """Shuffled batches, chosen rows, accumulated gradients: a label on another row would train on noise without a sign."""
    rows, labels = labelled
    seen = []

    def check(out, labels):
        seen.append((out.reconstruction.detach(), labels))
        return 0 * out.reconstruction.sum()

    # The label is in the row itself.
    marked = rows.clone()
    marked[:, 0] = labels.float()
    trainer = make_trainer(
        tmp_path, marked, labels=labels, label_loss=check, indices=range(1, 2000, 3), gradient_accumulation_steps=2
    )
    batches = []
    batch = trainer._batch
    trainer._batch = lambda read: batches.append(batch(read)) or batches[-1]
    trainer.train()
    assert len(seen) == 40
    for (x, _), (_, found) in zip(batches, seen, strict=True):
        assert torch.equal(x[:, 0].long(), found)


def test_labels_come_from_the_stores(labelled, tmp_path):
    """Stores that were extracted with labels need no `labels=`. Class 3 of birds is not class 3 of cars, unless both stores
    have the same class names; rows of a store without labels are of unknown class."""
    rows, labels = labelled
    names = [str(number) for number in range(10)]
    first = make_store(tmp_path / "first", rows[:900], labels[:900], class_names=names)
    second = make_store(tmp_path / "second", rows[900:1800], labels[900:1800], class_names=names)
    cars = make_store(tmp_path / "cars", rows[900:1800], labels[900:1800], class_names=[*names[:9], "car"])
    bare = make_store(tmp_path / "bare", rows[1800:])
    assert torch.equal(rows_of([first, bare, second], None).labels[:900], labels[:900])
    assert torch.equal(rows_of([first, second], None).labels, labels[:1800])
    assert torch.equal(rows_of([first, cars], None).labels, torch.cat([labels[:900], labels[900:1800] + 10]))
    assert rows_of([bare, bare], None).labels is None
    assert isinstance(rows_of([first, bare], None), UnionRows)
    assert (rows_of([first, bare], None).labels[900:] == -1).all()

    stored = make_trainer(tmp_path / "stored", first, label_loss=PrototypeAlignment())
    given = make_trainer(tmp_path / "given", rows[:900], labels=labels[:900].tolist(), label_loss=PrototypeAlignment())
    stored.train(), given.train()
    assert_same_weights(stored.model, given.model)
    unlabelled = make_trainer(tmp_path / "unlabelled", first)
    assert "label_loss" not in unlabelled.model.config.training_data, "labels that lie in a store are not used"
    with pytest.raises(ValueError, match="label_loss needs labels, and the rows have none"):
        make_trainer(tmp_path / "x", bare, label_loss=PrototypeAlignment())


def test_labels_without_a_use_are_refused(labelled, tmp_path):
    """Whoever passes labels thinks that they are used; and a negative weight would drive classes apart."""
    with pytest.raises(ValueError, match="labels are given, but no label_loss"):
        make_trainer(tmp_path, labelled[0], labels=labelled[1])
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight of the prototype alignment must be a number from 0"):
            PrototypeAlignment(weight)


def test_training_with_labels_resumes_exactly(labelled, tmp_path):
    """The same bits as an uninterrupted run; half with labels and half without, or with other labels or rows, is refused."""
    rows, labels = labelled
    setting = {"labels": labels, "label_loss": PrototypeAlignment(), "indices": range(1500)}
    whole = make_trainer(tmp_path / "whole", rows, save_steps=10, **setting)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-10")
    resumed = make_trainer(tmp_path / "resumed", rows, resume_from_checkpoint=checkpoint, **setting)
    resumed.train()
    assert_same_weights(whole.model, resumed.model)
    relabelled = labels.clone()
    relabelled[0] += 1
    for changed, message in (
        (
            {"labels": None, "label_loss": None},
            "label_loss={'name': 'PrototypeAlignment', 'weight': 0.8}, now it is None",
        ),
        ({"label_loss": PrototypeAlignment(0.5)}, "label_loss=.*'weight': 0.8}, now it is .*'weight': 0.5}"),
        ({"labels": relabelled}, "labels=[0-9a-f]{16}, now it is [0-9a-f]{16}"),
        ({"indices": range(1, 1501)}, "indices=[0-9a-f]{16}, now it is [0-9a-f]{16}"),
    ):
        trainer = make_trainer(tmp_path / "x", rows, resume_from_checkpoint=checkpoint, **(setting | changed))
        with pytest.raises(ValueError, match=message):
            trainer.train()


def test_an_sae_keeps_on_record_that_labels_shaped_it(labelled, tmp_path):
    """Trained with labels and then fine-tuned without: the card must not call it label-free."""
    rows, labels = labelled
    make_trainer(tmp_path / "first", rows, labels=labels, label_loss=PrototypeAlignment(), max_steps=2).train()
    sae = SAEModel.from_pretrained(tmp_path / "first")
    assert "label_loss" in make_trainer(tmp_path / "second", rows, model=sae).model.config.training_data
    anew = make_trainer(tmp_path / "third", rows, model=SAEConfig.from_pretrained(tmp_path / "first"))
    assert "label_loss" not in anew.model.config.training_data


@pytest.fixture()
def other_precision():
    """accelerate allows one precision a process; the tests need several."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_bfloat16_training(labelled, tmp_path, other_precision):
    """Mixed precision learns as well, keeps float32 weights, and hands back the SAE itself without an autocast around it; it must
    not lose the difference between latents and their class mean, nor break the graph."""
    rows, labels = labelled
    setting = {"labels": labels, "label_loss": PrototypeAlignment(), "max_steps": 100}
    half = make_trainer(tmp_path / "bf16", rows, mixed_precision="bf16", **setting)
    assert half.accelerator.mixed_precision == "bf16"
    metrics = half.train()
    sae = half.model
    assert {tensor.dtype for tensor in sae.state_dict().values()} == {torch.float32}
    loaded = SAEModel.from_pretrained(tmp_path / "bf16")
    x = rows[half.held_out_indices]
    with torch.no_grad():
        assert torch.equal(sae(x).fvu, loaded(x).fvu), "the thresholds were measured in float32"
    AcceleratorState._reset_state(True)
    exact = make_trainer(tmp_path / "float32", rows, **setting)
    assert metrics["fvu"] == pytest.approx(exact.train()["fvu"], rel=0.05)
    assert spread(half, rows, labels) == pytest.approx(spread(exact, rows, labels), rel=0.1)
