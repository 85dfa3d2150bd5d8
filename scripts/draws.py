"""What several scripts need: images drawn by label, with and without replacement, and an SAE for the rows drawn."""

from collections.abc import Sequence

import torch
from transformers import CLIPModel

from hf_vs2 import SAEConfig, SAEModel, SAETrainer, SAETrainingArguments, VS2CLIPForZeroShot


def halves(number: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of `number` images, split at random."""
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    return order[: number // 2], order[number // 2 :]


def shares_with(num_classes: int, share: float | None, common: int) -> torch.Tensor:
    """Share of each label, `(num_classes,)`: `share` for label `common`, the others alike; `None`: all alike."""
    wanted = torch.full((num_classes,), 1 / num_classes if share is None else (1 - share) / (num_classes - 1))
    if share is not None:
        wanted[common] = share
    return wanted


def drawn(labels: torch.Tensor, wanted: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of `number` images, some of them twice, whose labels have the shares `wanted` `(num_classes,)` on
    average."""
    weights = wanted[labels] / labels.bincount(minlength=len(wanted))[labels].clamp_min(1)
    return torch.multinomial(weights, number, replacement=True, generator=generator)


def picked(labels: torch.Tensor, counts: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Numbers of images, none twice: `counts[c]` of label c, or all there are."""
    chosen = [torch.empty(0, dtype=torch.long)]
    for label, count in enumerate(counts):
        own = (labels == label).nonzero().squeeze(-1)
        chosen.append(own[torch.randperm(len(own), generator=generator)[: max(0, count)]])
    return torch.cat(chosen)


def trained_sae(rows: torch.Tensor, folder: str, steps: int = 1500, seed: int = 0) -> SAEModel:
    """An SAE, k 16, and statistics of rows `(n, hidden_size)`."""
    arguments = SAETrainingArguments(
        output_dir=folder, max_steps=steps, seed=seed, save_steps=0, disable_tqdm=True, report_to="none"
    )
    trainer = SAETrainer(SAEConfig(hidden_size=rows.shape[1], top_k=16), arguments, rows)
    trainer.train()
    return trainer.model.eval()


def trained(clip: CLIPModel, rows: torch.Tensor, folder: str, steps: int = 1500, seed: int = 0) -> VS2CLIPForZeroShot:
    """The CLIP with an SAE of its CLS rows."""
    return VS2CLIPForZeroShot(clip, trained_sae(rows, folder, steps, seed)).eval()
