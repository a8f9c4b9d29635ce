"""The last stage over the samples, of losses l_i: their weights and the sum of w_i l_i.

w_i = b_i^-temperature / sum_j b_j^-temperature, where b_i = max(l_i, floor), and the normaliser is
the sum below (docs/equations.md, 4). RELATIVE: b_i = max(l_i / r_i, floor), and w_i is divided by a
reference r_i, or 0 where b_i has reached the cap.

Powers are taken of b_i / least b, so that none overflows. A few samples are the work of the last
program of the kernel that made the losses (``arrived_last``, ``finish``), many of two launches
(``many_samples.py``). Sums are fp64, in a fixed order: repeatable, and no atomics on floats.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)  # samples that a program takes at once
ONE_PROGRAM_SAMPLES = 4096  # what one program does in a few microseconds


@triton.jit
def raw_weight(base, temperature_high, temperature_low):
    """base^-temperature within a few ulp, for base >= 0 of any shape.

    exp2(-temperature * log2(base)) would lose as many bits as the exponent has; so base = 2^e * f,
    and the whole part of temperature * e, exact because temperature_high has 12 bits, goes into the
    result's exponent.
    """
    subnormal = base < 1.1754943508222875e-38
    bits = tl.where(subnormal, base * 16777216.0, base).to(tl.int32, bitcast=True)
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # [1, 2)
    large = fraction > 1.4142135
    fraction = tl.where(large, fraction * 0.5, fraction)
    exponent = ((bits >> 23) - 127 + tl.where(large, 1, 0) - tl.where(subnormal, 24, 0)).to(
        tl.float32
    )
    logarithm = tl.log2(fraction)  # in [-0.5, 0.5]
    exact = -temperature_high * exponent
    rest = -temperature_high * logarithm - temperature_low * (exponent + logarithm)
    whole = tl.floor(exact + rest + 0.5)
    inside = tl.minimum(tl.maximum(whole, -126.0), 127.0)
    power = ((inside.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2^whole
    raw = tl.exp2((exact - inside) + rest) * power
    raw = tl.where(whole > 127.0, float("inf"), tl.where(whole < -126.0, 0.0, raw))
    raw = tl.where(base == float("inf"), 0.0, tl.where(base == 0.0, float("inf"), raw))
    raw = tl.where(base != base, base, raw)
    return tl.where((temperature_high == 0.0) & (temperature_low == 0.0), 1.0, raw)


@triton.jit
def base_of(loss, counted, floor):
    """max(loss, floor), and a NaN stays; -1 for a sample without a label, by which it is known from
    here on.
    """
    return tl.where(counted, tl.where(loss < floor, floor, loss), -1.0)


@triton.jit
def arrived_last(counter_ptr, programs):
    """True in the one program that finds all others' stores done; it must set the counter back to
    0.
    """
    tl.debug_barrier()  # the atomic is one thread's: every thread's stores have to come before it
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit
def relative(base, inverse, temperature_high, temperature_low):
    """(base / least)^-temperature, at most 1, and exactly 1 for the least; 0 without a label.

    ``inverse`` = 1 / least in fp64: its product rounds to the quotient, without a division, a call,
    in every loop.
    """
    ratio = (base.to(tl.float64) * inverse).to(tl.float32)
    return tl.where(base < 0.0, 0.0, raw_weight(ratio, temperature_high, temperature_low))


@triton.jit
def least_of(lowest, wrong):
    """One number of [BLOCK] minima and whether there was a NaN; 1 if nothing is finite, as any
    number would do.
    """
    least = tl.min(lowest, 0)
    least = tl.where(least == float("inf"), 1.0, least)
    return tl.where(tl.max(wrong, 0) > 0, float("nan"), least)


@triton.jit
def relative_to(value, base, reference_ptr, at, last, cap):
    """value / r, and 0 from the cap on."""
    reference = tl.load(reference_ptr + at, mask=at < last, other=1.0)
    return tl.where(base >= cap, 0.0, tl.div_rn(value, reference))


@triton.jit
def totals(
    losses_ptr,
    bases_ptr,
    first,
    last,
    temperature_high,
    temperature_low,
    LINEAR: tl.constexpr,
    reference_ptr=None,
    cap=float("inf"),
    RELATIVE: tl.constexpr = False,
):
    """(least base, sum of raw weights, sum of raw weight * loss) of the samples from ``first`` to
    ``last``.

    LINEAR: the raw weights are the powers of the bases themselves.
    """
    lane = tl.arange(0, BLOCK)
    least = tl.full((), 1.0, tl.float32)
    if not LINEAR:
        lowest = tl.full([BLOCK], float("inf"), tl.float32)
        wrong = tl.zeros([BLOCK], tl.int32)
        for start in range(first, last, BLOCK):
            at = start + lane
            base = tl.load(bases_ptr + at, mask=at < last, other=-1.0, cache_modifier=".cg")
            lowest = tl.where((base >= 0.0) & (base < lowest), base, lowest)
            wrong |= (base != base).to(tl.int32)
        least = least_of(lowest, wrong)
    inverse = 1.0 / least.to(tl.float64)
    weight_sum = tl.zeros([BLOCK], tl.float64)
    loss_sum = tl.zeros([BLOCK], tl.float64)
    for start in range(first, last, BLOCK):
        at = start + lane
        base = tl.load(bases_ptr + at, mask=at < last, other=-1.0, cache_modifier=".cg")
        loss = tl.load(losses_ptr + at, mask=at < last, other=0.0, cache_modifier=".cg")
        raw = relative(base, inverse, temperature_high, temperature_low).to(tl.float64)
        if RELATIVE:
            loss = relative_to(loss, base, reference_ptr, at, last, cap)
        weight_sum += raw
        loss_sum += raw * loss.to(tl.float64)
    return least, tl.sum(weight_sum, 0), tl.sum(loss_sum, 0)


@triton.jit
def conclude(
    loss_ptr,
    normaliser_ptr,
    least,
    weight_sum,
    loss_sum,
    temperature_high,
    temperature_low,
    LINEAR: tl.constexpr,
    scale,
):
    """The loss and the logarithm of the normaliser; LINEAR: scale * the undivided sum, and the
    normaliser.
    """
    if LINEAR:
        tl.store(normaliser_ptr, weight_sum.to(tl.float32))
        tl.store(loss_ptr, (loss_sum * scale).to(tl.float32))
    else:
        temperature = tl.full((), 0.0, tl.float64) + temperature_high + temperature_low
        tl.store(normaliser_ptr, tl.log(weight_sum) - temperature * tl.log(least.to(tl.float64)))
        tl.store(loss_ptr, (loss_sum / _divisor(weight_sum)).to(tl.float32))


@triton.jit
def _divisor(weight_sum):
    """No labelled sample at all: weights of 0, not of 0 / 0."""
    return tl.where(weight_sum == 0.0, 1.0, weight_sum)


@triton.jit
def write_weights(
    bases_ptr,
    first,
    last,
    least,
    weight_sum,
    temperature_high,
    temperature_low,
    reference_ptr=None,
    cap=float("inf"),
    RELATIVE: tl.constexpr = False,
):
    """Normalised weights where the bases were, each by the thread that reads it."""
    lane = tl.arange(0, BLOCK)
    inverse, share = 1.0 / least.to(tl.float64), 1.0 / _divisor(weight_sum)
    for start in range(first, last, BLOCK):
        at = start + lane
        base = tl.load(bases_ptr + at, mask=at < last, other=-1.0, cache_modifier=".cg")
        raw = relative(base, inverse, temperature_high, temperature_low).to(tl.float64)
        weight = tl.where(base < 0.0, 0.0, raw * share).to(tl.float32)
        if RELATIVE:
            weight = relative_to(weight, base, reference_ptr, at, last, cap)
        tl.store(bases_ptr + at, weight, mask=at < last)


@triton.jit
def finish(
    losses_ptr,  # fp32 [samples]
    weights_ptr,  # fp32 [samples]: ``base_of`` the losses on entry, normalised weights on return
    loss_ptr,  # fp32 []
    normaliser_ptr,  # fp64 [], its logarithm; LINEAR: fp32 []
    samples,
    temperature_high,
    temperature_low,
    LINEAR: tl.constexpr,  # the loss is scale * sum of raw weight * loss
    scale,
    reference_ptr=None,  # fp32 [samples], only with RELATIVE
    cap=float("inf"),
    RELATIVE: tl.constexpr = False,
):
    """All of it, by one program."""
    tl.debug_barrier()  # this program's own losses and bases, written in another layout
    least, weight_sum, loss_sum = totals(
        losses_ptr,
        weights_ptr,
        0,
        samples,
        temperature_high,
        temperature_low,
        LINEAR,
        reference_ptr,
        cap,
        RELATIVE,
    )
    write_weights(
        weights_ptr,
        0,
        samples,
        least,
        weight_sum,
        temperature_high,
        temperature_low,
        reference_ptr,
        cap,
        RELATIVE,
    )
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
