"""Calibration: what the gate needs to know about an SAE, measured on unlabelled rows that it was not trained on."""

import math
from collections.abc import Sequence

import torch
from transformers.utils import logging

from ..config.sae import SAEConfig
from ..data.stores.rows import Rows, RowSource, chosen_rows, rows_of
from ..encoders.fingerprints import same_fingerprint
from ..functional.equations import fvu_per_sample
from ..functional.finite import first_broken_row
from ..functional.label_free import exact
from ..sae.modeling import SAEModel


logger = logging.get_logger(__name__)

LEVELS = tuple(percent / 100 for percent in range(1, 100)) + (0.995, 0.999)
"""Quantile levels stored with an SAE; the paper uses 0.90, 0.95, 0.99 and 0.995."""

# More rows at once are no faster.
_BATCH = 1024
# Numbers that a block's latents may take before the top-k, 256 MB: fewer rows at once for a very wide SAE.
_PRE_ACTIVATIONS = 2**26


def refuse_overflow(of_sae: torch.Tensor, numbers: Sequence[int] | torch.Tensor) -> None:
    """Refuse, by a `ValueError`, what an SAE makes of the rows of these numbers where it holds NaN or infinity."""
    broken = first_broken_row(of_sae)
    if broken is not None:
        raise ValueError(
            f"The SAE overflows on activation row {int(numbers[broken])}: its weights are far too large for these "
            "rows. Use an SAE that was trained on activations of this CLIP."
        )


def split_rows(num_rows: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers for training and for calibration, disjoint, drawn at random.

    `share` of the rows are held out, but at least 200, so that the 0.99 quantile of a small set means something, and
    at most a fifth. `share=0` holds none out.
    """
    held_out = 0 if share == 0 else min(max(round(share * num_rows), 200), num_rows // 5)
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    return order[held_out:].sort().values, order[:held_out].sort().values


def activation_statistics(rows: Rows, indices: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean `(hidden_size,)` and total variance (mean squared distance to the mean) in one pass of float64 sums; a
    variance that is rounding alone is 0.

    The sums are taken around the first row: with CLIP's large mean, `E x^2 - (E x)^2` would lose digits.
    """
    first = rows.take(indices[:1])[0]
    origin = first.double()
    total = torch.zeros_like(origin)
    squares = 0.0
    for block in rows.batches(indices=indices):
        centred = block.double() - origin
        total += centred.sum(0)
        squares += centred.square().sum().item()
    shift = total / len(indices)
    mean, variance = origin + shift, squares / len(indices) - shift.square().sum().item()
    return mean.float(), 0.0 if _is_rounding(variance, mean, first) else variance


def _is_rounding(variance: float, mean: torch.Tensor, row: torch.Tensor) -> bool:
    """Whether rows with this total variance around a mean, of which `row` is one, differ by rounding alone: the same
    image comes out of a CLIP some steps of float32 apart where it lies elsewhere in its batch, and then one step of a
    shorter type that rows are stored in."""
    step = 32 * torch.finfo(torch.float32).eps
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(row.to(dtype).to(row.dtype), row):
            step = torch.finfo(dtype).eps
    return variance <= step**2 * mean.double().square().sum().item()


def conformal_quantiles(fvu: torch.Tensor, levels: tuple[float, ...] = LEVELS) -> dict[str, float]:
    """Thresholds under which a fresh row of the same kind falls with probability at least `level`, for each level.

    The threshold for level q is the `ceil((n + 1) q)`-th smallest of the n held-out FVUs (split conformal prediction),
    not the plain sample quantile, which passes too few fresh rows when n is small. Levels that n rows can't vouch for,
    above `n / (n + 1)`, are left out.
    """
    ordered = fvu.double().sort().values.tolist()
    # The tolerance keeps (n + 1) q = 198.00000000000003 from asking for the 199th.
    ranks = {level: math.ceil((len(ordered) + 1) * level - 1e-9) for level in levels}
    # An infinite threshold (of a row that sits on the mean) is no gate, and JSON can't hold it.
    known = {level: ordered[rank - 1] for level, rank in ranks.items() if 1 <= rank <= len(ordered)}
    return {str(level): threshold for level, threshold in known.items() if math.isfinite(threshold)}


def is_converted(config: SAEConfig) -> bool:
    """Whether another library trained the SAE, so that the mean of its training rows is not known."""
    known = config.training_data or {}
    return "converted_from" in known and "num_rows" not in known  # which training it further notes


def rows_of_sae(sae: SAEModel, source: RowSource) -> Rows:
    """The rows that an SAE reads: of a store those of its layer. Rows of another layer or CLIP are a `ValueError`."""
    config, rows = sae.config, rows_of(source, sae.config.layer)
    layer, clip = (rows.origin.get(name) for name in ("layer", "base_model_fingerprint"))
    if layer is not None and config.layer is not None and layer != config.layer:
        raise ValueError(f"These are rows of layer {layer}, the SAE reads layer {config.layer}: extract those.")
    known = config.base_model_fingerprint
    if clip is not None and known is not None and not same_fingerprint(clip, known):
        raise ValueError(
            f"These rows were extracted with another CLIP ({rows.origin.get('base_model_name_or_path')}) than the one "
            f"that the SAE is of ({config.base_model_name_or_path}): extract them with that."
        )
    return rows


@torch.no_grad()
def calibrate(sae: SAEModel, rows: RowSource, indices: torch.Tensor | None = None) -> dict[str, float]:
    """
    Store per-sample FVU quantiles in `sae.config`, from unlabelled rows that the SAE was NOT trained on.

    In-sample rows are reconstructed better than fresh ones; with about 1,000 training rows their 0.99 quantile steers
    only 87-90 % of fresh in-domain images. A model that wraps the SAE with a gate in force goes on with the old
    threshold until its `set_steering(gate=...)` is called again.

    The mean of an SAE that another library trained is not in its files. It is measured on these rows, with the total
    variance.

    Args:
        sae (`SAEModel`): the SAE; its `mean` must be set. Its config's `fvu_quantiles`, `num_calibration_rows` and, if
            the rows are too few for it, default `gate` are changed.
        rows (`ActivationStore` or `torch.Tensor` of shape `(rows, hidden_size)`): CLS activations.
        indices (`torch.LongTensor`, *optional*): use only these rows.

    Returns:
        `dict`: `fvu` (of the whole set: squared error over squared distance to the training mean, in float64 sums) and
        `l0` (mean number of active latents), measured on these rows.

    Raises:
        `ValueError`: on no rows, rows of another width, rows that are not finite, or none off the training mean.
    """
    rows = rows_of_sae(sae, rows)
    indices = chosen_rows(indices, len(rows))
    if not len(indices):
        raise ValueError(
            "There are no rows to calibrate on. Give unlabelled activations that the SAE was not trained on."
        )
    if is_converted(sae.config):
        mean, sae.config.total_variance = activation_statistics(rows, indices)
        sae.mean.copy_(mean)
        sae.config.training_data = {**(sae.config.training_data or {}), "statistics_rows": len(indices)}
    error, spread, active, done = 0.0, 0.0, 0.0, 0
    fvus = []
    batch_size = max(1, min(_BATCH, _PRE_ACTIVATIONS // sae.config.weight_shape[0]))
    for block in rows.batches(batch_size, indices):
        block = block.to(sae.device)
        values, latents = sae.encode(block)
        reconstruction = sae.decode(values, latents).float()
        refuse_overflow(reconstruction, indices[done : done + len(block)])
        done += len(block)
        error += exact(block - reconstruction).square().sum().item()
        spread += exact(block - sae.mean).square().sum().item()
        active += (values != 0).sum().item()
        fvus.append(fvu_per_sample(block, reconstruction, sae.mean).cpu())
    if _is_rounding(spread / len(indices), sae.mean, rows.take(indices[:1])[0]):
        raise ValueError(
            "All rows to calibrate on lie on the mean of the training rows: they have no variance, so no FVU. Check "
            "how they were extracted."
        )
    config = sae.config
    config.fvu_quantiles = conformal_quantiles(torch.cat(fvus))
    config.num_calibration_rows = len(indices)
    config.gate = gate_within(config, config.gate)
    return {"fvu": error / spread, "l0": active / len(indices)}


def gate_within(config: SAEConfig, gate: float | None) -> float | None:
    """A gate, or with a warning the highest that the rows an SAE was calibrated on can vouch for, if that is lower."""
    highest = None if gate is None or not config.fvu_quantiles else config.usable_gate(gate)
    if highest == gate:
        return gate
    logger.warning(
        f"{config.num_calibration_rows} held-out rows can't vouch for the {gate} quantile; the default gate is set to "
        f"{highest}. For a higher one calibrate on more rows (in training: calibration_share), and set the gate anew."
    )
    return highest
