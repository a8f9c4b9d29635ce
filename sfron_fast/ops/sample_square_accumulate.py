"""Sums of squared per-sample gradients of a layer's weight: docs/equations.md, 2."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import number, require
from . import registry
from .arguments import FLOAT32_MAX, dense, floats, in_place
from .dtypes import accumulate_dtype, only_reference, wide


def formula(accumulator: Tensor, deltas: Tensor, inputs: Tensor, weight: float, power: int) -> None:
    """A += weight * |g|^power for g = sum_t delta_t x_t^T, sample after sample, each rounded as
    ``fisher_accumulate_`` rounds a gradient.
    """
    positions = math.prod(deltas.shape[1:-1])
    outputs, features = accumulator.shape[0], math.prod(accumulator.shape[1:])
    for delta, x in zip(deltas, inputs, strict=True):
        left = wide(delta).reshape(positions, outputs)
        gradient = left.T @ wide(x).reshape(positions, features)
        size = gradient * gradient if power == 2 else gradient.abs()
        accumulator.add_((size * weight).view(accumulator.shape))


def check(accumulator: Tensor, deltas: Tensor, inputs: Tensor, weight: float, power: int) -> None:
    """What the op demands of its arguments; raises ValueError."""
    floats("deltas", [deltas])
    floats("inputs", [inputs])
    for name, tensor in (("inputs", inputs), ("accumulator", accumulator)):
        require(tensor.device == deltas.device, name, f"device {deltas.device}", tensor.device)
    require(inputs.dtype == deltas.dtype, "inputs", f"dtype {deltas.dtype}", inputs.dtype)
    shape, seen = tuple(deltas.shape), tuple(inputs.shape)
    require(len(shape) > 1, "deltas", "[samples, *positions, outputs]", shape)
    shared = len(shape) - 1
    require(
        len(seen) > shared and seen[:shared] == shape[:shared],
        "inputs",
        f"[samples, *positions, *features] beside deltas {shape}",
        seen,
    )
    wanted = (shape[-1], *seen[shared:])
    found = tuple(accumulator.shape)
    require(found == wanted, "accumulator", f"shape {wanted}", found)
    dtype = accumulate_dtype(deltas.dtype)
    require(accumulator.dtype == dtype, "accumulator", f"dtype {dtype}", accumulator.dtype)
    in_place("accumulator", accumulator)
    number("weight", weight, -FLOAT32_MAX, FLOAT32_MAX)
    require(power in (1, 2), "power", "1 or 2", power)


SCHEMA = "(Tensor(a!) accumulator, Tensor deltas, Tensor inputs, float weight, int power) -> ()"


registry.define("sample_square_accumulate_", SCHEMA, formula, check)


def sample_square_accumulate_(
    accumulator: Tensor, deltas: Tensor, inputs: Tensor, weight: float = 1.0, *, power: int = 2
) -> Tensor:
    """accumulator += weight * sum_s |sum_t deltas[s, t] inputs[s, t]^T|^power, in place.

    The diagonal Fisher of a layer's weight (its sum of absolute gradients with ``power=1``) from
    what the layer read and the gradient of what it returned; no sample's gradient is stored.
    Samples are added in order: a batch that is cut into several calls leaves the same bits.

    Args:
        accumulator: fp32 [outputs, *features] (fp64 for fp64), contiguous.
        deltas: [samples, *positions, outputs], fp32, bf16, fp16 or fp64, with any strides; no
            positions for a linear layer of one input a sample, height and width for a convolution.
        inputs: [samples, *positions, *features], of the dtype of ``deltas``, with any strides: a
            convolution's is an ``as_strided`` view of the padded image, [samples, height, width,
            channels, kernel, kernel], which the CPU reads in place.
        weight: a finite number; may be negative.
        power: 2, or 1.
    Returns:
        ``accumulator``.
    Raises:
        ValueError, RuntimeError: wrong shape, dtype, device or range; nothing has been written.
    """
    if not torch.compiler.is_compiling():  # guards on strides would compile anew
        dense("accumulator", accumulator, True)
        negated = accumulator.is_neg()
        own = "a tensor that holds its own values"
        require(not negated, "accumulator", own, "a negated view", "clone it")
        dense("deltas", deltas, False)
        dense("inputs", inputs, False)
        weight = number("weight", weight, -FLOAT32_MAX, FLOAT32_MAX)
        require(power in (1, 2), "power", "1 or 2", repr(power))
    if accumulator.requires_grad:
        raise RuntimeError(
            "accumulator: expected a tensor that does not require grad, found one that does; an"
            " in-place sum of squares is not differentiable"
        )
    with torch.no_grad():
        given = (accumulator, _valued(deltas), _valued(inputs), float(weight), int(power))
        double = only_reference(deltas.dtype)
        name = "sample_square_accumulate_"
        (registry.default_kernel(name) if double else registry.op(name))(*given)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(accumulator)
    return accumulator


def _valued(tensor: Any) -> Tensor:
    """The tensor with its strides, but with its own values in memory, as ``layout.in_memory``."""
    if torch.compiler.is_compiling():
        return tensor
    return tensor.clone() if torch._is_zerotensor(tensor) else tensor.resolve_neg()
