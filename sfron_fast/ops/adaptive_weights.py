"""Weights of samples by their losses: docs/equations.md, 4 and 5 (paper: eps~)."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from .dtypes import accumulate_dtype
from .rows import transformed

LOSS_FLOOR = 1e-6  # a loss of exactly 0 would take all the weight and give no gradient


def formula(
    losses: Tensor,
    temperature: float,
    floor: float,
    counted: Tensor | None = None,
    reference: Tensor | None = None,
    cap: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """losses [samples] -> weights b_i^-lambda / sum_j b_j^-lambda [samples], b = max(l, floor), and
    that sum's log.

    In fp64, and relative to the least b, so that no power overflows and the largest is 1; the
    logarithm [] stays fp64. Samples that are not ``counted`` (bool [samples]) weigh 0, and if none
    is, the logarithm is -inf. One NaN among the others makes them all NaN.

    With a ``reference`` r [samples], b = max(l / r, floor), and the weights are divided by r; those
    of b >= cap (> floor) are 0, the sum as before. An r that is not positive and finite is NaN.
    """
    base = losses.to(torch.float64)
    if reference is not None:
        sound = (reference > 0) & (reference < math.inf)
        reference = torch.where(sound, reference, math.nan).to(torch.float64)
        base = base / reference
    base = base.clamp_min(floor)
    relative = base
    if counted is not None:
        base = torch.where(counted, base, math.inf)
    least = torch.cat([base, base.new_full((1,), math.inf)]).amin()  # samples may be none
    least = torch.where(least == math.inf, 1.0, least)
    raw = (base / least).pow(-temperature)
    if counted is not None:
        raw = torch.where(counted, raw, 0.0)
    total = raw.sum()
    weights = torch.where(raw == 0, 0.0, raw / total)  # also if no sample has a label: not 0 / 0
    if reference is not None:
        weights = torch.where(relative >= cap, 0.0, weights / reference)
    return weights.to(losses.dtype), total.log() - temperature * least.log()


def adaptive_weights(
    losses: Tensor,
    temperature: float = 0.5,
    floor: float = LOSS_FLOOR,
    *,
    reference: Tensor | None = None,
    cap: float | None = None,
    group: Any = None,
) -> Tensor:
    """Weights [samples] = max(l_i, floor)^-temperature / sum_j max(l_j, floor)^-temperature,
    detached, fp32.

    For any per-sample loss of your own: ``(adaptive_weights(l) * l).sum()``. Where the size of a
    loss says less of the sample than of what was drawn for it (the timestep of a diffusion loss),
    the ``reference`` says what it usually is: the weights are then those of l_i / r_i, over r_i, so
    that the same sum is of losses relative to it.

    Args:
        losses: [samples].
        temperature, floor: as ``adaptive_cross_entropy``; with a reference the floor is one of
            l_i / r_i.
        reference: r_i > 0, [samples] of the losses' dtype, or what they are widened to.
        cap: > floor; a sample whose loss has reached cap * r_i weighs 0, the others what they did.
            None = no cap.
        group: as ``adaptive_cross_entropy``.

    Raises:
        ValueError: not [samples], empty, a temperature, floor or cap out of range, a reference of
            another shape or (on the CPU) one that is not > 0, or a cap without one.
    """
    number("temperature", temperature, 0.0)
    number("floor", floor, 0.0, open_low=True)
    limit = math.inf if cap is None else cap
    some = losses.dim() == 1 and (losses.numel() > 0 or group is not None)
    require(some, "losses", "[samples], at least one", tuple(losses.shape))
    require(losses.is_floating_point(), "losses", "a floating dtype", losses.dtype)
    wide = losses.detach().to(accumulate_dtype(losses.dtype))
    if isinstance(reference, Tensor) and reference.dtype == losses.dtype:
        reference = reference.to(wide.dtype)
    check_reference(reference, len(losses), wide, floor, limit)
    weights, log_normaliser = formula(wide, temperature, floor, None, reference, limit)
    return weights if group is None else weights * portion(log_normaliser, group)


def check_reference(
    reference: Tensor | None, samples: int, like: Tensor, floor: float, cap: float
) -> None:
    """A reference for each of ``samples``, of the dtype losses of ``like`` have, and a cap for it;
    inf = none. Raises ValueError.
    """
    if cap != math.inf:
        number("cap", cap, floor, open_low=True)
    if reference is None:
        require(cap == math.inf, "reference", f"losses [{samples}], with a cap", None)
        return
    found: object = type(reference).__name__
    require(isinstance(reference, Tensor), "reference", "a tensor [samples]", found)
    wanted, shape = accumulate_dtype(like.dtype), tuple(reference.shape)
    require(shape == (samples,), "reference", f"shape ({samples},)", shape)
    require(reference.dtype == wanted, "reference", f"dtype {wanted}", reference.dtype)
    where = reference.device
    require(where == like.device, "reference", f"device {like.device}", where)
    if readable(reference):
        bad = reference[~((reference > 0) & (reference < math.inf))]
        if bad.numel():
            require(False, "reference", "finite losses > 0", float(bad[0]))


def readable(tensor: Tensor) -> bool:
    """On other devices reading would wait for the device; compiled or transformed, there is nothing
    to read.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not transformed()


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
