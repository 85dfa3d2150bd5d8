"""A training checkpoint from a bad disk or from a stranger: continued to the same bits, or refused in one message, and never run."""

import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from harms import Code, by_a_bad_disk, tensor, tensors, without
from safetensors.torch import load_file
from toy import sparse_rows
from trainings import make_trainer

from hf_vs2.files.digests import file_digest
from hf_vs2.training.progress import COUNTERS_NAME, STATE_NAME, _state_digest


TRIES, MANY_TRIES = 10, 300
"""Damages of one checkpoint, in the fast test and in the slow one; each is tried as it is, and with the digests made to fit."""
SETTING = {"max_steps": 8, "save_steps": 4, "logging_steps": 2}
STEP = 4


@pytest.fixture(scope="module")
def rows():
    return sparse_rows(600)


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """`(checkpoint folder, weights at the end of the run that was not interrupted)`."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(folder, rows, **SETTING)
    trainer.train()
    return folder / f"checkpoint-{STEP}", trainer.model.state_dict()


@pytest.fixture()
def checkpoint(whole, tmp_path):
    return Path(shutil.copytree(whole[0], tmp_path / "copy" / whole[0].name))


def resumed(checkpoint, rows):
    """The weights at the end of the run that goes on from there."""
    trainer = make_trainer(checkpoint.parent, rows, **SETTING, resume_from_checkpoint=str(checkpoint))
    trainer.train()
    return trainer.model.state_dict()


def outcome(checkpoint, rows, expected, is_sealed=False):
    """`"same"`, `"other"` numbers, or `"refused"`, with the checkpoint named unless somebody made digests that fit; anything
    else fails the test."""
    try:
        found = resumed(checkpoint, rows)
    except (ValueError, OSError) as error:
        assert is_sealed or (str(checkpoint) in str(error) and "\n" not in str(error)), error
        return "refused"
    assert is_sealed or all(tensor.isfinite().all() for tensor in found.values())
    return "same" if all(torch.equal(found[name], tensor) for name, tensor in expected.items()) else "other"


def seal(checkpoint):
    """Digests that fit, as whoever writes the files on purpose would make them."""
    path = checkpoint / STATE_NAME
    try:
        state = json.loads(path.read_text())
        state["files"] = {
            name: file_digest(checkpoint / name) if (checkpoint / name).is_file() else digest
            for name, digest in state["files"].items()
        }
        state.pop("digest", None)
        state["digest"] = _state_digest(state)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # too broken to be sealed
    path.write_text(json.dumps(state))


def damage(checkpoint, generator, ran):
    """One harm to one file, drawn by `generator`; a description of it."""
    path = checkpoint / generator.choice(sorted(file.name for file in checkpoint.iterdir()))
    kind, content = generator.choice([*["disk"] * 6, "delete", "swap", "pickle", "torch pickle"]), path.read_bytes()
    place = generator.randrange(len(content))
    if kind == "disk":
        kind, damaged = by_a_bad_disk(content, generator, place)
        path.write_bytes(damaged)
    elif kind == "swap":
        path.write_bytes(generator.choice(sorted(checkpoint.iterdir())).read_bytes())
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Code(ran)))
    elif kind == "torch pickle":
        torch.save(Code(ran), path)
    else:
        path.unlink()
    return f"{kind} at {place} of {path.name}"


def damage_and_resume(whole, rows, folder, tries, seed):
    generator, ran = random.Random(seed), folder / "ran"
    seen = {"as it is": [], "sealed": []}
    for number in range(tries):
        for how, outcomes in seen.items():
            checkpoint = Path(shutil.copytree(whole[0], folder / f"{number}-{how}" / whole[0].name))
            state = generator.getstate()
            what = damage(checkpoint, generator, ran)
            if how == "as it is":
                generator.setstate(state)
            else:
                seal(checkpoint)
            outcomes.append(outcome(checkpoint, rows, whole[1], how == "sealed"))
            assert not ran.exists(), f"{what} ran as code"
            assert how == "sealed" or outcomes[-1] != "other", f"{what} was not seen"
            shutil.rmtree(checkpoint.parent)
    return seen


@pytest.mark.parametrize("tries", [TRIES, pytest.param(MANY_TRIES, marks=pytest.mark.slow)])
def test_random_damage_is_refused_or_continued_to_the_same_bits(whole, rows, tmp_path, tries):
    """A disk that lost a block, or a copy that stopped: other numbers than the undisturbed run's must not come out in silence.
    With digests that fit, numbers that somebody chose are trained on, and code is not."""
    seen = damage_and_resume(whole, rows, tmp_path, tries, seed=tries)
    assert seen["as it is"].count("refused") > tries / 2
    assert tries == TRIES or {"refused", "same", "other"} <= set(seen["sealed"])


def test_an_undamaged_copy_continues_to_the_same_bits(whole, rows, checkpoint):
    """Else all the refusals here would mean nothing."""
    assert outcome(checkpoint, rows, whole[1]) == "same"
    seal(checkpoint)
    assert outcome(checkpoint, rows, whole[1]) == "same"


def edit_state(change):
    def harm(checkpoint):
        path = checkpoint / STATE_NAME
        state = json.loads(path.read_text())
        path.write_text(json.dumps(change(state) or state))

    return harm


def edit_optimizer(change):
    def harm(checkpoint):
        path = checkpoint / "optimizer.bin"
        state = torch.load(path, weights_only=True)
        torch.save(change(state) or state, path)

    return harm


def set_counters(value):
    return tensors(lambda found: found.update(steps_since_active=value), COUNTERS_NAME)


def set_moment(name, value):
    return edit_optimizer(lambda state: state["state"][0].update({name: value}))


def replace_weights_by_pickle(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    forget_weights(checkpoint)


forget_weights = edit_state(lambda state: state["files"].pop("model.safetensors") and None)


# Each on top of digests that fit: only the content is wrong.
HARMS = {
    "state is no JSON": (lambda checkpoint: (checkpoint / STATE_NAME).write_text("{"), STATE_NAME),
    "state is nested without end": (lambda checkpoint: (checkpoint / STATE_NAME).write_text("[" * 10**5), STATE_NAME),
    "state is a list": (edit_state(lambda state: [state]), STATE_NAME),
    "plan without a seed": (edit_state(lambda state: state["plan"].pop("seed") and None), "seed=None, now it is 42"),
    "plan of another type": (edit_state(lambda state: state["plan"].update(learning_rate="x")), "learning_rate=x"),
    "counters too few": (set_counters(torch.zeros(95, dtype=torch.int64)), COUNTERS_NAME),
    "counters gone": (lambda checkpoint: (checkpoint / COUNTERS_NAME).unlink(), f"{COUNTERS_NAME} .*it is missing"),
    "counters of another name": (
        tensors(lambda found: found.update(x=found.pop("steps_since_active")), COUNTERS_NAME),
        COUNTERS_NAME,
    ),
    "weights of another shape": (
        tensor("b_enc", lambda found: torch.zeros(95)),
        r"model.safetensors: b_enc is \(95,\)",
    ),
    "a weight is missing": (without("b_pre"), "lacks b_pre"),
    "weights in a pickle": (replace_weights_by_pickle, "has no model.safetensors"),
    "moments of another shape": (set_moment("exp_avg", torch.zeros(2, 24)), r"exp_avg of W_enc .*\(2, 24\)"),
    "moments are text": (set_moment("exp_avg", "zero"), "can't be continued from"),
    "no moments": (edit_optimizer(lambda state: state["state"].clear()), "can't be continued from"),
    "no groups": (edit_optimizer(lambda state: state.pop("param_groups") and None), "can't be continued from"),
    "optimizer is a list": (edit_optimizer(lambda state: [state]), "can't be continued from"),
    "optimizer gone": (lambda checkpoint: (checkpoint / "optimizer.bin").unlink(), "optimizer.bin .*it is missing"),
    "state of a stranger's object": (lambda checkpoint: (checkpoint / "custom_checkpoint_0.pkl").touch(), "custom"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_checkpoint_that_cannot_be_trusted_is_refused(rows, checkpoint, harm):
    """Each would give another run than the one that was interrupted, a crash hours later, or (Adam's moments of another shape)
    memory read that is not its own."""
    do, message = HARMS[harm]
    do(checkpoint)
    seal(checkpoint)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        resumed(checkpoint, rows)
    assert str(checkpoint) in str(caught.value)


def test_settings_come_from_the_plan(whole, rows, checkpoint):
    """A learning rate or betas in a checkpoint's optimizer file would train with settings that nobody is told of."""
    edit_optimizer(lambda state: state["param_groups"][0].update(betas=(0.0, 0.0), lr=9.0, initial_lr=9.0))(checkpoint)
    seal(checkpoint)
    assert outcome(checkpoint, rows, whole[1]) == "same"


@pytest.mark.parametrize(
    "name", ["optimizer.bin", "random_states_0.pkl", "pytorch_model.bin", "scaler.pt", "custom_checkpoint_0.pkl"]
)
def test_code_in_a_training_checkpoint_is_not_run(rows, checkpoint, tmp_path, name):
    """Whoever continues somebody else's training reads pickles of theirs. As a plain pickle and in torch's wrapping."""
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
        forget_weights(checkpoint)
    for write in (lambda code, path: path.write_bytes(pickle.dumps(code)), torch.save):
        write(Code(tmp_path / "ran"), checkpoint / name)
        seal(checkpoint)
        try:
            resumed(checkpoint, rows)
        except (ValueError, OSError) as error:
            assert str(checkpoint) in str(error)
        assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Code(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "it would have left a trace"
