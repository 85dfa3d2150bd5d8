"""The paper's equations as pure tensor functions (Chatzoudis et al., arXiv 2506.01247).

Shapes: `x` is `(batch, hidden_size)`, a batch of CLS activations; `values` and `indices` are `(batch, top_k)`, the active
latents of each row; `decoder` is `(num_latents, hidden_size)`, one decoder direction `d_i` a row. `gamma` is a number or
one factor a latent, `(num_latents,)`. Everything differentiable stays differentiable; nothing is modified in place.
"""

from __future__ import annotations

import torch

from .sparse_ops import sparse_decode


ACTIVATIONS = ("relu", "absolute")


def top_k(pre_activations: torch.Tensor, k: int, activation: str = "relu") -> tuple[torch.Tensor, torch.Tensor]:
    """TopK of eq. 1: the `k` entries of each row that stay, as `(values, indices)`, each `(batch, k)`.

    `"absolute"` keeps the entries of largest absolute value with their sign, as eq. 1 is printed. `"relu"` applies ReLU
    first, as the released training code (EleutherAI's `sparsify`) does; a row with fewer than `k` positive entries
    then has values of exactly zero, which contribute nothing.
    """
    if activation == "relu":
        return torch.relu(pre_activations).topk(k, dim=-1, sorted=False)
    if activation == "absolute":
        indices = pre_activations.abs().topk(k, dim=-1, sorted=False).indices
        return pre_activations.gather(-1, indices), indices
    raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")


def amplify(values: torch.Tensor, indices: torch.Tensor, gamma: float | torch.Tensor) -> torch.Tensor:
    """The amplified code `gamma * c` of eq. 2, as values on the same indices: `(batch, top_k)`."""
    return values * (gamma[indices] if isinstance(gamma, torch.Tensor) and gamma.ndim else gamma)


def steering_vector(
    values: torch.Tensor, indices: torch.Tensor, decoder: torch.Tensor, gamma: float | torch.Tensor
) -> torch.Tensor:
    """Eq. 2: `v = D(gamma c) - D(c) = sum_i (gamma_i - 1) c_i d_i`, `(batch, hidden_size)`. The decoder's bias cancels."""
    return sparse_decode(amplify(values, indices, gamma) - values, indices, decoder)


def contrastive_direction(
    positive_codes: torch.Tensor, negative_codes: torch.Tensor, decoder: torch.Tensor, gamma: float | torch.Tensor
) -> torch.Tensor:
    """Eq. 5 (VS2++): `(gamma - 1) W_dec (mean c over positives - mean c over negatives)`, `(hidden_size,)`.

    Codes are dense, `(rows, num_latents)`; an empty set has mean 0.
    """

    def mean_code(codes: torch.Tensor) -> torch.Tensor:
        return codes.mean(0) if len(codes) else codes.new_zeros(codes.shape[-1])

    return ((gamma - 1) * (mean_code(positive_codes) - mean_code(negative_codes))) @ decoder


def keep_norm(moved: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Algorithm 1, last step: `moved` rescaled row by row to the norm of `x`. A row moved to exactly 0 stays 0."""
    moved_norm = moved.norm(dim=-1, keepdim=True)
    scale = x.norm(dim=-1, keepdim=True) / moved_norm
    return moved * torch.where(moved_norm > 0, scale, torch.zeros_like(scale))


def steer(x: torch.Tensor, direction: torch.Tensor, lambda_: float) -> torch.Tensor:
    """Eq. 3: `(x + lambda v) * ||x|| / ||x + lambda v||`."""
    return keep_norm(x + lambda_ * direction, x)


def centroid_steer(x: torch.Tensor, centroid: torch.Tensor, alpha: float) -> torch.Tensor:
    """The control that proposition 3.1 calls for: `x + alpha (x - mu)`, norm kept, no SAE involved.

    VS2 with a perfect reconstruction equals this with `alpha = lambda (gamma - 1)` and `mu = b_pre`.
    """
    return keep_norm(x + alpha * (x - centroid), x)


def fvu_per_sample(x: torch.Tensor, reconstruction: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`||x~ - x||^2 / ||x - mu||^2` for each row, float32 `(batch,)`; `mean` is that of the TRAINING activations.

    A row that sits exactly on the mean has no variance to explain: its FVU is infinite unless it is reconstructed exactly.
    A row with a NaN has a NaN FVU, which no gate lets through.
    """
    x = x.float()
    error = (reconstruction.float() - x).square().sum(-1)
    spread = (x - mean.float()).square().sum(-1)
    return torch.where(error == 0, torch.zeros_like(error), error / spread)


def gate(fvu: torch.Tensor, threshold: float) -> torch.Tensor:
    """Which rows to steer: those with `FVU(x) <= tau`, bool `(batch,)`. The rest keep plain CLIP's result exactly."""
    return fvu <= threshold
