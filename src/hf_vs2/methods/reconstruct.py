"""The SAE's reconstruction in the row's place (REC-F), plain or of the amplified code (REC-F+gamma)."""

from ..functional.equations import amplify
from .base import Batch, LatentStep, Method, register


def reconstruct(batch: Batch) -> LatentStep:
    """`D(c)`."""
    return batch.moved(start=batch.reconstruction, keeps_norm=False)


def amplified(batch: Batch) -> LatentStep:
    """`D(gamma c)`: the reconstruction, and what amplifying adds to it."""
    change = amplify(batch.values, batch.indices, batch.gamma) - batch.values
    return batch.moved(change, batch.indices, start=batch.reconstruction, keeps_norm=False)


register(
    Method(
        "reconstruct",
        "reconstruction",
        "The SAE's reconstruction takes the row's place (the paper's REC-F).",
        step=reconstruct,
        compared=True,
    )
)
register(
    Method(
        "amplify",
        "amplified reconstruction",
        "The reconstruction of the amplified code takes the row's place (the paper's REC-F+gamma).",
        step=amplified,
        explains=True,
        shows=("gamma",),
        compared=True,
    )
)
