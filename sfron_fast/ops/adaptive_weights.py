"""Weights of samples by their losses: docs/equations.md, 4 and 5 (paper: eps~)."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from .dtypes import accumulate_dtype

LOSS_FLOOR = 1e-6  # a loss of exactly 0 would take all the weight and give no gradient


def formula(
    losses: Tensor, temperature: float, floor: float, counted: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """losses [samples] -> weights b_i^-lambda / sum_j b_j^-lambda [samples], b = max(l, floor), and
    that sum's log.

    In fp64, and relative to the least b, so that no power overflows and the largest is 1; the
    logarithm [] stays fp64. Samples that are not ``counted`` (bool [samples]) weigh 0, and if none
    is, the logarithm is -inf. One NaN among the others makes them all NaN.
    """
    base = losses.to(torch.float64).clamp_min(floor)
    if counted is not None:
        base = torch.where(counted, base, math.inf)
    least = torch.cat([base, base.new_full((1,), math.inf)]).amin()  # samples may be none
    least = torch.where(least == math.inf, 1.0, least)
    raw = (base / least).pow(-temperature)
    if counted is not None:
        raw = torch.where(counted, raw, 0.0)
    total = raw.sum()
    weights = torch.where(raw == 0, 0.0, raw / total)  # also if no sample has a label: not 0 / 0
    return weights.to(losses.dtype), total.log() - temperature * least.log()


def adaptive_weights(
    losses: Tensor, temperature: float = 0.5, floor: float = LOSS_FLOOR, *, group: Any = None
) -> Tensor:
    """Weights [samples] = max(l_i, floor)^-temperature / sum_j max(l_j, floor)^-temperature,
    detached, fp32.

    For any per-sample loss of your own: ``(adaptive_weights(l) * l).sum()``. ``group``: as
    ``adaptive_cross_entropy``.

    Raises:
        ValueError: not [samples], empty, or a temperature or floor out of range.
    """
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    some = losses.dim() == 1 and (losses.numel() > 0 or group is not None)
    require(some, "losses", "[samples], at least one", tuple(losses.shape))
    require(losses.is_floating_point(), "losses", "a floating dtype", losses.dtype)
    wide = losses.detach().to(accumulate_dtype(losses.dtype))
    weights, log_normaliser = formula(wide, temperature, floor)
    return weights if group is None else weights * portion(log_normaliser, group)


# --- ranks that share a batch: what each back-propagates is averaged ------------------------------


def mean(normaliser: Tensor, group: Any) -> Tensor:
    """The ranks' average, the same bits on each."""
    mean = normaliser.detach().clone()
    torch.distributed.all_reduce(mean, group=group)
    return mean / torch.distributed.get_world_size(group)


def portion(log_normaliser: Tensor, group: Any) -> Tensor:
    """What turns a rank's own average into its summand of the whole batch's, times the number of
    ranks. fp64.

    Of the logarithms, so that no temperature overflows; a NaN of one rank is every rank's.
    """
    own, ranks = log_normaliser.detach().reshape(1), torch.distributed.get_world_size(group)
    everyone = own.new_empty(ranks)
    torch.distributed.all_gather_into_tensor(everyone, own, group=group)
    portion = (own[0] - everyone.logsumexp(dim=0)).exp() * ranks
    # no labelled sample here, nor perhaps anywhere
    return torch.where(own[0] == -math.inf, 0.0, portion)


def nothing_of(source: Tensor, group: Any) -> Tensor:
    """The summand of a rank without samples: 0, with a gradient, which the other ranks wait for."""
    nothing = source.sum(dtype=accumulate_dtype(source.dtype))
    return nothing * portion(nothing.new_full((), -math.inf, dtype=torch.float64), group).to(
        nothing.dtype
    )
