"""What the launchers of the Triton kernels ask for, noted instead of launched, on no device.

For the shapes in use: kernel, programs, types of its arguments, constants and options, from which
``triton_report.py`` compiles it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

CLASSES = (10, 200, 1000, 32000, 50257, 128256, 152064)
SAMPLES = {
    (256, 3 * 32 * 32): "images 3x32x32",
    (64, 4 * 32 * 32): "latents 4x32x32",
    (4, 3 * 512 * 512): "3x512x512",
}
LAYERS = ((1, 1000, 2048), (128, 768, 3072), (1024, 64, 147))  # positions, outputs, features
DTYPES = (torch.bfloat16, torch.float32)


@dataclass
class Launch:
    """What a launcher asked of one kernel; picklable, to be compiled by another process."""

    module: str
    kernel: str
    programs: int
    signature: dict[str, str]  # argument -> type
    constants: dict[str, Any]
    options: dict[str, Any]
    elements: int = 0  # of each tensor
    purpose: str = ""
    dtype: str = ""

    def key(self) -> tuple:
        return (
            self.kernel,
            *self.signature.items(),
            *self.constants.items(),
            *self.options.items(),
        )


@dataclass
class Recorder:
    """Stands in for a kernel in its module and notes launches instead of making them."""

    module: str
    kernel: Any
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            names = self.kernel.arg_names
            constants = {n: v for n, v in kwargs.items() if n in names}
            options = {n: v for n, v in kwargs.items() if n not in names}
            given = dict(zip(names, args, strict=False))
            signature = {n: "constexpr" if n in constants else type_name(given[n]) for n in names}
            self.launches.append(
                Launch(self.module, self.kernel.__name__, grid[0], signature, constants, options)
            )

        return launch


def type_name(value: Any) -> str:
    names = {
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.float32: "fp32",
        torch.float64: "fp64",
        torch.int64: "i64",
        torch.int32: "i32",
    }
    if isinstance(value, torch.Tensor):
        return "*" + names[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, the launchers take tensors on the meta device, and their launches are noted."""
    from sfron_fast.ops.triton import (
        adaptive_cross_entropy,
        adaptive_mse,
        linear_kl_rows,
        linear_moments,
        linear_rows,
        many_samples,
        sample_square_accumulate,
        soft_target_kl,
    )

    launches: list[Launch] = []
    modules = (
        adaptive_cross_entropy,
        adaptive_mse,
        soft_target_kl,
        many_samples,
        linear_kl_rows,
        linear_moments,
        linear_rows,
        sample_square_accumulate,
    )
    found = [(m, n) for m in modules for n in vars(m) if n.endswith("_kernel")]
    kernels = {(m, n): getattr(m, n) for m, n in found}
    for (module, name), kernel in kernels.items():
        setattr(module, name, Recorder(module.__name__, kernel, launches))
    try:
        yield launches
    finally:
        for (module, name), kernel in kernels.items():
            setattr(module, name, kernel)


def cross_entropy_launches(
    samples: int, tokens: int, classes: int, dtype: torch.dtype
) -> list[Launch]:
    from sfron_fast.ops.triton import adaptive_cross_entropy as op

    logits = torch.empty((samples, tokens, classes), dtype=dtype, device="meta")
    labels = torch.empty((samples, tokens), dtype=torch.int64, device="meta")
    with recorded() as launches:
        loss, _, weights, _, log_sums = op.adaptive_cross_entropy(logits, labels, 0.5, 1e-6, -100)
        op.adaptive_cross_entropy_backward(loss, logits, labels, weights, log_sums, -100)
        if tokens == 1:
            op.adaptive_cross_entropy_sum_(logits, labels, 0.5, 1e-6, -100, 1.0)
            op.adaptive_cross_entropy_scale_(logits, loss)
    purpose = f"V={classes}" + (f" x {tokens} tokens" if tokens > 1 else "")
    return named(launches, purpose, dtype, logits.numel())


def mse_launches(samples: int, elements: int, dtype: torch.dtype, purpose: str) -> list[Launch]:
    from sfron_fast.ops.triton import adaptive_mse as op

    prediction, target = (
        torch.empty((samples, elements), dtype=dtype, device="meta") for _ in range(2)
    )
    with recorded() as launches:
        loss, _, weights, _ = op.adaptive_mse(prediction, target, None, 0.5, 1e-6, True, math.inf)
        op.adaptive_mse_backward(loss, prediction, target, weights, True)
    return named(launches, f"{samples} {purpose}", dtype, prediction.numel())


def kl_launches(
    samples: int, classes: int, dtype: torch.dtype, of_classes: bool = False
) -> list[Launch]:
    """``of_classes``: with a bias and a weight for each class."""
    from sfron_fast.ops.triton import soft_target_kl as op

    logits, teacher = (
        torch.empty((samples, classes), dtype=dtype, device="meta") for _ in range(2)
    )
    given = [None, *[torch.empty(classes, device="meta") if of_classes else None] * 2]
    with recorded() as launches:
        loss, _, log_sums = op.soft_target_kl(logits, teacher, *given, 2.0)
        op.soft_target_kl_backward(loss, logits, teacher, *given, log_sums, 2.0)
    purpose = f"V={classes}" + (", of classes" if of_classes else "")
    return named(launches, purpose, dtype, logits.numel())


def linear_launches(
    rows: int, classes: int, dtype: torch.dtype, softcap: float | None
) -> list[Launch]:
    """Of a tile of logits, whose gradient is multiplied in ``dtype``."""
    from sfron_fast.ops.triton import linear_kl_rows, linear_moments
    from sfron_fast.ops.triton import linear_rows as op

    values, teacher = (torch.empty((rows, classes), device="meta") for _ in range(2))
    labels, row = (torch.empty(rows, dtype=d, device="meta") for d in (torch.int64, torch.float32))
    with recorded() as launches:
        op.linear_log_sums_(values, labels, 0, row, row, row)
        out = torch.empty_like(values, dtype=dtype)
        op.linear_gradient_(values, labels, 0, row, row, row, softcap, out)
        linear_moments.linear_moments_(values, labels, 0, row, row, row, row, row, labels)
        linear_kl_rows.linear_kl_sums_(values, teacher, row, row, row, row, row)
        linear_kl_rows.linear_kl_gradient(values, teacher, row, row, row, row, softcap, dtype)
    capped = "" if softcap is None else ", capped"
    return named(launches, f"tile of {classes}{capped}", dtype, values.numel())


def sample_launches(
    samples: int, positions: int, outputs: int, features: int, dtype: torch.dtype
) -> list[Launch]:
    from sfron_fast.ops.triton import sample_square_accumulate as op

    deltas, inputs = (
        torch.empty((samples, positions, lanes), dtype=dtype, device="meta")
        for lanes in (outputs, features)
    )
    accumulator = torch.empty((outputs, features), device="meta")
    with recorded() as launches:
        op.sample_square_accumulate_(accumulator, deltas, inputs, 1.0, 2)
    return named(launches, f"{outputs}x{features}, T={positions}", dtype, inputs.numel())


def named(launches: list[Launch], purpose: str, dtype: torch.dtype, elements: int) -> list[Launch]:
    for launch in launches:
        launch.purpose, launch.dtype, launch.elements = (
            purpose,
            str(dtype).removeprefix("torch."),
            elements,
        )
    return launches


def all_launches() -> list[Launch]:
    launches = []
    for dtype in DTYPES:
        for classes in CLASSES:
            launches += cross_entropy_launches(8192 if classes >= 32000 else 256, 1, classes, dtype)
        launches += cross_entropy_launches(8, 1024, 128256, dtype)
        for classes in CLASSES:
            for of_classes in (False, True):
                samples = 8192 if classes <= 1000 else 1024
                launches += kl_launches(samples, classes, dtype, of_classes)
        for (samples, elements), purpose in SAMPLES.items():
            launches += mse_launches(samples, elements, dtype, purpose)
        for positions, outputs, features in LAYERS:
            launches += sample_launches(64, positions, outputs, features, dtype)
        for softcap in (None, 30.0):
            launches += linear_launches(8192, 8192, dtype, softcap)
    return list({launch.key(): launch for launch in reversed(launches)}.values())[::-1]
