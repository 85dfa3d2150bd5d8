"""The paper's equations once more, in plain loops over numpy float64: what the tensor code must agree with.

Written from `arXiv 2506.01247` alone, one input at a time, with no import from `hf_vs2` or torch. Names as in the paper:
`x` is one CLS row `(hidden,)`, `W_enc` and `W_dec` are `(num_latents, hidden)`, one latent a row.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class ReferenceSAE:
    """Weights of a top-k SAE as float64 arrays."""

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_pre: np.ndarray
    mean: np.ndarray
    k: int
    activation: str

    @classmethod
    def of(cls, sae) -> "ReferenceSAE":
        """From anything with `state_dict()` and a config (the only thing read of an `SAEModel` are its numbers)."""
        arrays = {name: tensor.double().numpy() for name, tensor in sae.state_dict().items()}
        return cls(**arrays, k=sae.config.top_k, activation=sae.config.activation)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Eq. 1, the dense code c `(num_latents,)`: all but k entries are zero."""
        pre = np.array([np.dot(row, x - self.b_pre) + bias for row, bias in zip(self.W_enc, self.b_enc, strict=True)])
        if self.activation == "relu":
            pre = np.maximum(pre, 0.0)
        order = sorted(range(len(pre)), key=lambda i: -abs(pre[i]))
        c = np.zeros_like(pre)
        for i in order[: self.k]:
            c[i] = pre[i]
        return c

    def decode(self, c: np.ndarray) -> np.ndarray:
        """Eq. 1, x~ = W_dec c + b_pre."""
        x = self.b_pre.copy()
        for i in np.flatnonzero(c):
            x = x + c[i] * self.W_dec[i]
        return x

    def fvu(self, x: np.ndarray) -> float:
        """Per-sample FVU: ||x~ - x||^2 / ||x - mu||^2."""
        error = self.decode(self.encode(x)) - x
        return float(np.sum(error**2) / np.sum((x - self.mean) ** 2))


def keep_norm(moved: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Algorithm 1: back to the length of x."""
    return moved * np.linalg.norm(x) / np.linalg.norm(moved)


def steer(
    sae: ReferenceSAE, x: np.ndarray, method: str, gamma, lambda_: float, tau: float | None, known=None
) -> np.ndarray:
    """What becomes of one CLS row. `gamma` is a number or one factor a latent; `tau` the gate's threshold; `known` has the means
    of rows and latents, for `"corrected"`."""
    if method == "none" or (tau is not None and not sae.fvu(x) <= tau):
        return x
    c = sae.encode(x)
    factors = np.broadcast_to(np.asarray(gamma, dtype=np.float64), c.shape)
    if method == "vs2":  # eq. 2 and 3: D(gamma c) - D(c)
        return keep_norm(x + lambda_ * (sae.decode(factors * c) - sae.decode(c)), x)
    if method == "centroid":  # proposition 3.1 with a perfect reconstruction
        return keep_norm(x + lambda_ * (float(gamma) - 1) * (x - sae.mean), x)
    if method == "reconstruct":  # REC-F
        return sae.decode(c)
    if method == "amplify":  # REC-F + gamma
        return sae.decode(factors * c)
    if (
        method == "corrected"
    ):  # the centroid part without the SAE's error, and half as much of what the latents say beyond it
        alpha, mean, z_mean = (
            lambda_ * (float(gamma) - 1),
            known.mean.double().numpy(),
            known.latent_mean.double().numpy(),
        )
        return keep_norm(x + alpha * (x - mean) + alpha / 2 * ((c - z_mean) @ sae.W_dec), x)
    raise ValueError(method)


def contrastive_direction(positives, negatives, W_dec: np.ndarray, gamma) -> np.ndarray:
    """Eq. 5: (gamma - 1) W_dec (mean of positive codes - mean of negative codes); an empty set's mean is 0."""
    means = []
    for codes in (positives, negatives):
        total = np.zeros(len(W_dec))
        for c in codes:
            total = total + c / len(codes)
        means.append(total)
    factors = np.broadcast_to(np.asarray(gamma, dtype=np.float64), (len(W_dec),))
    direction = np.zeros(W_dec.shape[1])
    for i in range(len(W_dec)):
        direction = direction + (factors[i] - 1) * (means[0][i] - means[1][i]) * W_dec[i]
    return direction
