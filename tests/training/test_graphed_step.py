"""On one GPU a training step is replayed as a CUDA graph: it must be the same training, only quicker."""

import pytest
import torch
from accelerate.state import AcceleratorState
from toy import clip_like_rows

from hf_vs2 import SAEConfig, SAETrainer, SAETrainingArguments
from hf_vs2.training.graphed_step import GraphedStep


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HIDDEN = 48


@pytest.fixture(autouse=True)
def any_precision():
    """accelerate allows one a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def train(folder, rows, **arguments):
    arguments = {"max_steps": 40, "per_device_train_batch_size": 128, "learning_rate": 3e-3, **arguments}
    # From step 10 on latents can be dead: a second graph, with the AuxK loss, takes over.
    settings = SAETrainingArguments(
        output_dir=str(folder), dead_latent_threshold=10, logging_steps=10, disable_tqdm=True, **arguments
    )
    trainer = SAETrainer(SAEConfig(hidden_size=HIDDEN, top_k=4, aux_k=16), settings, rows)
    metrics = trainer.train()
    return trainer.model.state_dict(), metrics


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_the_graph_trains_the_same_sae(tmp_path, mixed_precision):
    rows = clip_like_rows(2000, HIDDEN, seed=0)
    graphed, metrics = train(tmp_path / "graphed", rows, mixed_precision=mixed_precision)
    eager, expected = train(tmp_path / "eager", rows, mixed_precision=mixed_precision, disable_cuda_graphs=True)
    for name, tensor in eager.items():
        torch.testing.assert_close(graphed[name], tensor, rtol=1e-3, atol=1e-4)
    assert metrics["dead_share"] == expected["dead_share"]
    assert metrics["fvu"] == pytest.approx(expected["fvu"], rel=1e-4)


def test_a_continued_run_gives_the_same_bits(tmp_path):
    """The first steps after a checkpoint are taken as they come, those of the run that was not interrupted were replayed."""
    rows = clip_like_rows(2000, HIDDEN, seed=0)
    whole, _ = train(tmp_path, rows, save_steps=10, save_total_limit=9)
    for step in (10, 30):
        again, _ = train(tmp_path, rows, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        for name, tensor in whole.items():
            assert torch.equal(again[name], tensor), (name, step)


def test_every_call_counts_once_and_sees_its_own_rows():
    """A recording is no step by itself, and a replay must not see the rows that it was recorded with."""
    device = torch.device("cuda")
    total, calls = torch.zeros(4, device=device), torch.zeros((), device=device)

    def step(x):
        total.add_(x.sum(0))
        calls.add_(1)

    graphed = GraphedStep(step, device)
    batches = [torch.randn(8, 4) for _ in range(9)]
    for batch in batches:
        graphed(batch.pin_memory())
    assert calls.item() == len(batches)
    torch.testing.assert_close(total.cpu(), torch.cat(batches).sum(0))
