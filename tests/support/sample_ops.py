"""Entry of the op over samples: squares of a layer's per-sample gradients."""

import math

import tolerances
import torch
from cases import Case, values
from judging import assert_within
from op_entries import Op
from spoiling import bad_numbers, put

from sfron_fast import functional
from sfron_fast.ops import registry as ops
from sfron_fast.ops import rows

NAME = "sample_square_accumulate_"
# samples, positions, outputs, features
SMALL = (3, (4,), 5, (6,))
SHAPES = {
    "small": SMALL,
    "one position": (6, (), 5, (40,)),
    "one of one position": (7, (1,), 3, (33,)),
    "one output": (3, (5,), 1, (300,)),
    "one feature": (3, (5,), 70, (1,)),
    "a lane": (2, (16,), 2, (32,)),
    "beyond a block": (2, (17,), 67, (261,)),
    "beyond a depth": (3, (35,), 7, (70,)),
    "samples beyond a depth": (19, (), 7, (70,)),
    "image": (2, (3, 5), 4, (3, 3, 3)),
    "no samples": (0, (4,), 5, (6,)),
    "no positions": (3, (0,), 5, (6,)),
    "no outputs": (3, (4,), 0, (6,)),
    "no features": (3, (4,), 5, (2, 0)),
}


def sample_case(
    shape=SMALL, dtype=torch.float32, device="cpu", *, weight=0.7, power=2, scale=1.0
) -> Case:
    samples, positions, outputs, features = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "accumulator": values((outputs, *features), wide, device).abs(),
        "deltas": values((samples, *positions, outputs), dtype, device, scale=scale),
        "inputs": values((samples, *positions, *features), dtype, device),
    }
    return Case(tensors, {"weight": weight, "power": power})


def sums_are_close(case: Case) -> None:
    """The kernel, its checked formula and the public call."""
    bounds = {"accumulator": tolerances.sample_squares(**case.tensors, **case.scalars)}
    kernel = rows.in_place_kernel(NAME, case.tensors["deltas"].dtype)
    for served in (kernel, ops.default_kernel(NAME), functional.sample_square_accumulate_):
        mine = case.clone()
        mine.run(served)
        assert_within({"accumulator": mine.tensors["accumulator"]}, bounds)


SAMPLE_SQUARES = Op(
    name=NAME,
    call=functional.sample_square_accumulate_,
    make=sample_case,
    judge=sums_are_close,
    settings={
        f"{name}, power {power}": {"shape": shape, "power": power}
        for name, shape in SHAPES.items()
        for power in (1, 2)
    }
    | {
        f"weight {weight}": {"weight": weight, "shape": (5, (), 4, (7,))}
        for weight in (0.0, 1.0, -1.0, 1e-30)
    }
    | {
        "large": {"scale": 1e3},
        "small values": {"scale": 1e-4},
        "plain": {},
        "linear": {"power": 1},
    },
    thorough=("plain", "linear"),
    opcheck_shapes=(SMALL, (3, (2, 3), 4, (2, 3, 3))),
    compile_shape=SMALL,
    shape_for_threads=(3, (9,), 150, (700,)),
    wrong=[
        ("deltas-vector", put("deltas", lambda t: t[:, 0, 0]), "deltas"),
        ("deltas-integers", put("deltas", lambda t: t.int()), "deltas"),
        ("inputs-short", put("inputs", lambda t: t[1:]), "inputs"),
        ("inputs-positions", put("inputs", lambda t: t[:, 1:]), "inputs"),
        ("inputs-no-features", put("inputs", lambda t: t[..., 0]), "inputs"),
        ("inputs-bf16", put("inputs", lambda t: t.bfloat16()), "inputs"),
        ("inputs-meta", put("inputs", lambda t: t.to("meta")), "inputs"),
        ("accumulator-shape", put("accumulator", lambda t: t[1:]), "accumulator"),
        ("accumulator-flat", put("accumulator", lambda t: t.flatten()), "accumulator"),
        ("accumulator-bf16", put("accumulator", lambda t: t.bfloat16()), "accumulator"),
        ("accumulator-meta", put("accumulator", lambda t: t.to("meta")), "accumulator"),
        ("accumulator-strides", put("accumulator", lambda t: t.T.contiguous().T), "accumulator"),
        *bad_numbers(weight=(math.inf, -math.inf, 1e39)),
        ("power", lambda case: case.scalars.update(power=3), "power"),
    ],
)
