"""Compiles the Triton kernels of tests/gpu and the benchmark into Triton's cache, on all cores.

`python3 tests/gpu/precompile.py`: otherwise the tests compile some 275 kernels one after the other.
The launchers are called as they are, with tensors that have no memory; a launch compiles its kernel
and ends there. Needs no GPU: `--capability 9.0` says for which. What is missed here compiles when
it is used.
"""

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support"), str(ROOT / "tests/gpu")]

# the op, the shape of what it streams, and its dtype
Call = tuple[str, tuple[int, ...], torch.dtype]


def calls() -> list[Call]:
    """Of the tests, the sanitizers' program and the benchmark."""
    import row_cases as rc
    import sample_ops
    import sanitize
    import test_triton_ops as tests

    from benchmarks.cases import sample_cases
    from benchmarks.cases.row_cases import ENTROPIES, SQUARES, TARGETS

    shapes = {
        "cross_entropy": [
            *rc.ROWS,
            *tests.LONG,
            *sanitize.ENTROPIES,
            *((n, 1, v) for n, v in tests.SUMS),
        ],
        "squared_error": [*rc.SQUARES, *tests.LARGE, *sanitize.SQUARES],
        "soft_targets": [*rc.CLASSES, *tests.TARGETS, *sanitize.TARGETS],
    }
    for _, make, shape in tests.CALLS:
        shapes[make.__name__].append(shape)
    found = {
        (kind, shape, dtype) for kind in shapes for shape in shapes[kind] for dtype in rc.DTYPES
    }
    found |= {("cross_entropy", (n, 1, v), dtype) for n, v, dtype in ENTROPIES}
    found |= {("squared_error", (n, size), dtype) for n, size, dtype in SQUARES}
    found |= {("soft_targets", (n, v), dtype) for n, v, dtype in TARGETS}
    shapes = [
        *((n, math.prod(t), o, math.prod(i)) for n, t, o, i in sample_ops.SHAPES.values()),
        *((n, math.prod(t), o, i) for n, t, o, i in sample_cases.LINEAR + sample_cases.NORMS),
        *((n, hw * hw, o, c * k * k) for n, hw, o, c, k in sample_cases.CONVOLUTIONS),
    ]
    found |= {("sample_squares", shape, dtype) for shape in shapes for dtype in rc.DTYPES}
    return sorted(found, key=str)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(call: Call) -> None:
    """Every launch of an op, forward and backward."""
    from sfron_fast.ops.triton import launcher

    kind, shape, dtype = call
    if kind == "sample_squares":
        samples, positions, outputs, features = shape
        factors = [meta(samples, positions, n, dtype=dtype) for n in (outputs, features)]
        for power in (1, 2):
            launcher("sample_square_accumulate_")(meta(outputs, features), *factors, 1.0, power)
        return
    x = meta(*shape, dtype=dtype)
    if kind == "cross_entropy":
        labels = meta(*shape[:2], dtype=torch.int64)
        loss, _, weights, _, sums = launcher("adaptive_cross_entropy")(x, labels, 0.5, 1e-6, -100)
        for name in ("adaptive_cross_entropy_backward", "adaptive_cross_entropy_backward_"):
            launcher(name)(loss, x, labels, weights, sums, -100)
        if shape[1] == 1:
            launcher("adaptive_cross_entropy_sum_")(x, labels, 0.5, 1e-6, -100, 1.0)
            launcher("adaptive_cross_entropy_scale_")(x, loss)
    elif kind == "squared_error":
        for mean, given in ((True, None), (False, None), (True, meta(shape[0]))):
            loss, _, weights, _ = launcher("adaptive_mse")(x, x, given, 0.5, 1e-6, mean, 3.0)
            launcher("adaptive_mse_backward")(loss, x, x, weights, mean)
    else:
        each = meta(shape[1])
        for given in product((meta(shape[0]), None), (each, None), (each, None)):
            loss, _, sums = launcher("soft_target_kl")(x, x, *given, 2.0)
            launcher("soft_target_kl_backward")(loss, x, x, *given, sums, 2.0)


class NoDriver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def prepare(capability: int) -> None:
    """In a process that compiles: no driver, and launches that end before the launch."""
    import triton
    from triton.runtime import driver

    driver.set_active(NoDriver(capability))
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    triton.JITFunction.run = compile_only


def attempt(call: Call) -> str:
    """Why a call did not compile, or nothing."""
    try:
        launch(call)
    except Exception as error:
        return f"{call}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def compiled() -> Iterator[Path]:
    """The kernels in Triton's cache."""
    from triton import knobs

    return Path(knobs.cache.dir).glob("*/*.cubin")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", default="9.0")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    began, before = time.perf_counter(), len(list(compiled()))
    jobs = calls()
    random.Random(0).shuffle(jobs)  # neighbours want the same kernels
    capability = int(options.capability.replace(".", ""))
    with ProcessPoolExecutor(options.workers, get_context("spawn"), prepare, (capability,)) as pool:
        wrong = list(filter(None, pool.map(attempt, jobs)))
    print("\n".join(wrong[:20]))
    made = (
        f"{len(list(compiled())) - before} kernels compiled for sm_{capability}, {options.workers}"
        " at a time"
    )
    print(f"{len(jobs)} calls, {made}, {time.perf_counter() - began:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
