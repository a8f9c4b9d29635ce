"""Parts that the row kernels share: the weight of one loss, the last stage over the samples, launch helpers."""

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

FINISH_BLOCK = tl.constexpr(1024)  # samples a lane group of the last stage takes at once


@triton.jit
def raw_weight(loss, temperature_high, temperature_low, floor):
    """max(loss, floor)^-temperature (README equation 7) within a few ulp, for any shape.

    exp2(-temperature * log2(base)) would lose as many bits as the exponent has; so base = 2^e * f, and the whole
    part of temperature * e, exact because temperature_high has 12 bits, goes into the result's exponent.
    """
    base = tl.where(loss < floor, floor, loss)  # a NaN stays
    subnormal = base < 1.1754943508222875e-38
    bits = tl.where(subnormal, base * 16777216.0, base).to(tl.int32, bitcast=True)
    fraction = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)  # [1, 2)
    large = fraction > 1.4142135
    fraction = tl.where(large, fraction * 0.5, fraction)
    exponent = ((bits >> 23) - 127 + tl.where(large, 1, 0) - tl.where(subnormal, 24, 0)).to(tl.float32)
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
def arrived_last(counter_ptr, programs):
    """True in the one program that finds all others' stores done; it must set the counter back to 0."""
    tl.debug_barrier()  # the atomic is one thread's: every thread's stores have to come before it
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == programs - 1


@triton.jit
def finish(
    losses_ptr,  # fp32 [samples]
    weights_ptr,  # fp32 [samples]: raw weights on entry, normalised on return
    loss_ptr,  # fp32 []
    normaliser_ptr,  # fp32 []
    samples,
    MAY_BE_EMPTY: tl.constexpr,  # no sample counts at all: weights 0, not 0 / 0
    SUM: tl.constexpr,  # the loss is scale * sum of raw weight * loss
    scale,
):
    """Normaliser, weights and loss, by one program in a fixed order: repeatable, and no atomics on floats."""
    lane = tl.arange(0, FINISH_BLOCK)
    tl.debug_barrier()  # this program's own losses and weights, written in another layout
    raw_sum = tl.zeros([FINISH_BLOCK], tl.float64)
    for start in range(0, samples, FINISH_BLOCK):
        at = start + lane
        raw_sum += tl.load(weights_ptr + at, mask=at < samples, other=0.0, cache_modifier=".cg").to(tl.float64)
    normaliser = tl.sum(raw_sum)
    divisor = tl.where(normaliser > 0.0, normaliser, 1.0) if MAY_BE_EMPTY else normaliser
    loss = tl.zeros([FINISH_BLOCK], tl.float64)
    for start in range(0, samples, FINISH_BLOCK):
        at = start + lane
        raw = tl.load(weights_ptr + at, mask=at < samples, other=0.0, cache_modifier=".cg").to(tl.float64)
        value = tl.load(losses_ptr + at, mask=at < samples, other=0.0, cache_modifier=".cg").to(tl.float64)
        weight = (raw / divisor).to(tl.float32)
        tl.store(weights_ptr + at, weight, mask=at < samples)
        if SUM:
            loss += raw * value
        else:
            loss += weight.to(tl.float64) * value
    total = tl.sum(loss)
    if SUM:
        total *= scale
    tl.store(normaliser_ptr, normaliser.to(tl.float32))
    tl.store(loss_ptr, total.to(tl.float32))


# --- host side ---------------------------------------------------------------------------------------------------

# As for the list ops: a product and a sum round twice, whatever Triton's default of the day
STRICT = {"enable_fp_fusion": False}


def split(temperature: float) -> tuple[float, float]:
    """temperature = high + low, high with 12 bits; past 1e30 the powers are 0, 1 and inf as for infinity."""
    temperature = min(temperature, 1e30)
    mantissa, exponent = math.frexp(temperature)
    high = math.ldexp(round(mantissa * 4096.0), exponent - 12)
    return high, temperature - high


def power_of_two(n: int) -> int:
    """Smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def alignment(n: int) -> int:
    """Largest power of two up to 16 that divides n: rows start aligned to that many elements."""
    return math.gcd(n, 16)


_counters: dict[tuple[int, int], Tensor] = {}


def arrival_counter(like: Tensor) -> Tensor:
    """int32 [1], 0 between launches: one for each stream, whose launches cannot overlap."""
    if not like.is_cuda:
        return torch.zeros(1, dtype=torch.int32)  # the interpreter
    if torch.cuda.is_current_stream_capturing():  # a graph may be replayed on any stream: it gets its own
        return torch.zeros(1, dtype=torch.int32, device=like.device)
    key = (like.device.index, torch.cuda.current_stream(like.device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=like.device)
    return _counters[key]


def on_device(like: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device; the tensors may be on another."""
    return torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext()


def sample_outputs(like: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], losses [samples], weights [samples], normaliser [], uninitialised fp32."""
    scalar, vector = (), (samples,)
    return tuple(  # type: ignore[return-value]
        torch.empty(shape, dtype=torch.float32, device=like.device) for shape in (scalar, vector, vector, scalar)
    )
