"""``finish`` of ``samples.py`` where there are thousands of samples: a launch for their totals, one
for the weights.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common
from .samples import BLOCK, arrived_last, conclude, least_of, relative, totals, write_weights

GROUP = 4096  # samples of a program

UNSPECIALISED = ("samples", "groups", "group")


@triton.jit(do_not_specialize=UNSPECIALISED)
def _samples_totals_kernel(
    losses_ptr,  # fp32 [samples]
    bases_ptr,  # fp32 [samples]
    partials_ptr,  # fp64 [3, groups]
    totals_ptr,  # fp64 [2]: least, sum of raw weights
    loss_ptr,  # as of ``finish``
    normaliser_ptr,
    counter_ptr,  # int32 [1]
    samples,
    group,  # samples of a program
    groups,
    temperature_high,
    temperature_low,
    scale,
    reference_ptr,  # fp32 [samples], only with RELATIVE
    cap,
    LINEAR: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    """The totals of a group; the last program to arrive joins them, each brought to the least base
    of all.
    """
    # this group's least base and sums, where the last program will find them
    program = tl.program_id(0)
    first = program.to(tl.int64) * group
    last = tl.minimum(first + group, samples)
    least, weight_sum, loss_sum = totals(
        losses_ptr,
        bases_ptr,
        first,
        last,
        temperature_high,
        temperature_low,
        LINEAR,
        reference_ptr,
        cap,
        RELATIVE,
    )
    tl.store(partials_ptr + program, least.to(tl.float64))
    tl.store(partials_ptr + groups + program, weight_sum)
    tl.store(partials_ptr + 2 * groups + program, loss_sum)
    if arrived_last(counter_ptr, groups):
        # the least base of all groups that have a labelled sample
        lane = tl.arange(0, BLOCK)
        lowest = tl.full([BLOCK], float("inf"), tl.float32)
        wrong = tl.zeros([BLOCK], tl.int32)
        for start in range(0, groups, BLOCK):
            at = start + lane
            base = tl.load(
                partials_ptr + at, mask=at < groups, other=float("inf"), cache_modifier=".cg"
            )
            raw = tl.load(
                partials_ptr + groups + at, mask=at < groups, other=0.0, cache_modifier=".cg"
            )
            # a raw weight of 0: nothing labelled in the group
            base = tl.where(raw == 0.0, float("inf"), base).to(tl.float32)
            lowest = tl.where(base < lowest, base, lowest)
            wrong |= (base != base).to(tl.int32)
        least = least_of(lowest, wrong)
        inverse = 1.0 / least.to(tl.float64)
        # the groups' sums, each brought from its own least base to that of all
        weights = tl.zeros([BLOCK], tl.float64)
        losses = tl.zeros([BLOCK], tl.float64)
        for start in range(0, groups, BLOCK):
            at = start + lane
            base = tl.load(partials_ptr + at, mask=at < groups, other=1.0, cache_modifier=".cg").to(
                tl.float32
            )
            raw = tl.load(
                partials_ptr + groups + at, mask=at < groups, other=0.0, cache_modifier=".cg"
            )
            loss = tl.load(
                partials_ptr + 2 * groups + at, mask=at < groups, other=0.0, cache_modifier=".cg"
            )
            if not LINEAR:
                factor = relative(base, inverse, temperature_high, temperature_low).to(tl.float64)
                raw *= tl.where(raw == 0.0, 1.0, factor)
                loss *= tl.where(loss == 0.0, 1.0, factor)
            weights += raw
            losses += loss
        if LINEAR:
            least = tl.full((), 1.0, tl.float32)
        weight_sum, loss_sum = tl.sum(weights, 0), tl.sum(losses, 0)
        tl.store(totals_ptr, least.to(tl.float64))
        tl.store(totals_ptr + 1, weight_sum)
        conclude(
            loss_ptr,
            normaliser_ptr,
            least,
            weight_sum,
            loss_sum,
            temperature_high,
            temperature_low,
            LINEAR,
            scale,
        )
        tl.store(counter_ptr, 0)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _samples_weights_kernel(
    bases_ptr,  # fp32 [samples], weights on return
    totals_ptr,  # fp64 [2]
    samples,
    group,
    temperature_high,
    temperature_low,
    reference_ptr,
    cap,
    RELATIVE: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * group
    least, weight_sum = tl.load(totals_ptr).to(tl.float32), tl.load(totals_ptr + 1)
    last = tl.minimum(first + group, samples)
    write_weights(
        bases_ptr,
        first,
        last,
        least,
        weight_sum,
        temperature_high,
        temperature_low,
        reference_ptr,
        cap,
        RELATIVE,
    )


def finish_many(
    losses: Tensor,
    weights: Tensor,
    loss: Tensor,
    normaliser: Tensor,
    counter: Tensor,
    temperature: float,
    scale: float | None,
    reference: Tensor | None = None,
    cap: float = math.inf,
) -> None:
    """``finish`` over many programs. ``scale`` None: not LINEAR; ``reference``: RELATIVE."""
    samples = losses.numel()
    groups = triton.cdiv(samples, GROUP)
    partials, totals = (losses.new_empty(n, dtype=torch.float64) for n in (3 * groups, 2))
    numbers = common.split(temperature)
    relative = losses if reference is None else reference, cap
    _samples_totals_kernel[(groups,)](
        losses,
        weights,
        partials,
        totals,
        loss,
        normaliser,
        counter,
        samples,
        GROUP,
        groups,
        *numbers,
        1.0 if scale is None else scale,
        *relative,
        LINEAR=scale is not None,
        RELATIVE=reference is not None,
        num_warps=8,
        maxnreg=128,  # unsaid, some are spilled for one program more to a processor
        **common.STRICT,
    )
    _samples_weights_kernel[(groups,)](
        weights,
        totals,
        samples,
        GROUP,
        *numbers,
        *relative,
        RELATIVE=reference is not None,
        num_warps=4,
        **common.STRICT,
    )
