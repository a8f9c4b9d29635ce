"""Entries of the ops over the rows of a tile of logits, which the ops over heads call."""

import math

import torch
from cases import DTYPES, Case, values
from judging import assert_within
from op_entries import Op
from spoiling import bad_numbers, put
from tolerances import FUNCTION, U, roundings, stored

from sfron_fast.ops import registry as ops
from sfron_fast.ops import rows
from sfron_fast.ops.dtypes import accumulate_dtype

FLUSHED = 2.0**-125  # what exp makes 0


def labels_of(rows, columns, start, device):
    """One in three before the tile, one within, one behind."""
    low = torch.arange(rows) % 3 * columns - columns + start
    return (low + torch.randint(columns, (rows,))).to(device)


def unit(dtype):
    """Of the arithmetic on tiles of that dtype, relative to that of fp32."""
    return torch.finfo(dtype).eps / torch.finfo(torch.float32).eps


def judged(name, case, written, bounds):
    """The kernel and its checked formula."""
    dtype = case.tensors["values"].dtype
    for kernel in (rows.in_place_kernel(name, dtype), ops.default_kernel(name)):
        mine = case.clone()
        mine.run(kernel)
        assert_within({key: mine.tensors[key] for key in written}, bounds)


# --- linear_log_sums_ -----------------------------------------------------------------------------


def sums_case(
    shape=(7, 70), dtype=torch.float32, device="cpu", *, start=0, scale=1.0, first=False, below=0.0
) -> Case:
    """``below``: by how much the maximum so far lies below the tile's, about."""
    size, columns = shape
    maximum = values((size,), dtype, device, scale=scale) + scale - below
    others = values((size,), dtype, device).abs()
    if first:
        maximum, others = torch.full_like(maximum, -math.inf), torch.zeros_like(others)
    tensors = {
        "values": values(shape, dtype, device, scale=scale),
        "labels": labels_of(size, columns, start, device),
        "maximum": maximum,
        "others": others,
        "picked": torch.full_like(maximum, 0.5),
    }
    return Case(tensors, {"start": start})


def sums_bounds(case: Case) -> dict:
    """Truths in fp64, and bounds of the arithmetic of the tile's dtype."""
    x, before, others, picked = (
        case.tensors[name].double() for name in ("values", "maximum", "others", "picked")
    )
    eps = unit(case.tensors["values"].dtype)
    columns = x.shape[1]
    label = case.tensors["labels"] - case.scalars["start"]
    inside = (label >= 0) & (label < columns)
    column = label.clamp(0, columns - 1).unsqueeze(1)
    maximum = torch.maximum(before, x.amax(1))
    relative = x - maximum.unsqueeze(1)
    own = torch.zeros_like(x, dtype=torch.bool).scatter(1, column, inside.unsqueeze(1))
    powers = torch.where(own, 0.0, relative.exp())
    distance = torch.where(powers == 0, 0.0, relative.abs() * U + FUNCTION)
    kept = others * (before - maximum).exp()
    moved = torch.where(kept == 0, 0.0, (maximum - before) * U)
    total = kept + powers.sum(1)
    error = (powers * distance).sum(1) + kept * (moved + FUNCTION + U)
    error = error + total * (roundings(columns) + 3) * U + (columns + 1) * FLUSHED
    exact = torch.zeros_like(total)
    found = torch.where(inside, x.gather(1, column).squeeze(1), picked)
    return {
        "maximum": (maximum, exact),
        "others": (total, error * eps * 1.001),
        "picked": (found, exact),
    }


def sums_are_close(case: Case) -> None:
    judged("linear_log_sums_", case, ("maximum", "others", "picked"), sums_bounds(case))


LABELS = [
    ("labels-short", put("labels", lambda t: t[1:]), "labels"),
    ("labels-int32", put("labels", lambda t: t.int()), "labels"),
    ("labels-meta", put("labels", lambda t: t.to("meta")), "labels"),
    ("values-vector", put("values", lambda t: t[0]), "values"),
    ("values-no-classes", put("values", lambda t: t[:, :0]), "values"),
    ("values-bf16", put("values", lambda t: t.bfloat16()), "values"),
    ("start", lambda case: case.scalars.update(start=-1), "start"),
]
SHAPES = {
    f"{columns} columns": {"shape": (5, columns), "start": 1000}
    for columns in (1, 2, 31, 32, 33, 2047, 2048, 2049, 4100)
}


def bad_rows(*names):
    return [
        mistake
        for name in names
        for mistake in (
            (f"{name}-short", put(name, lambda t: t[1:]), name),
            (f"{name}-double", put(name, lambda t: t.double()), name),
        )
    ]


LOG_SUMS = Op(
    name="linear_log_sums_",
    make=sums_case,
    judge=sums_are_close,
    settings={
        "plain": {},
        "first tile": {"first": True, "start": 0},
        "last tile": {"start": 128_000, "shape": (9, 333)},
        "new maximum": {"below": 5.0},
        "far below": {"below": 200.0},
        "far above": {"below": -200.0},
        "confident": {"scale": 30.0},
        "very confident": {"scale": 1e4},
        "no rows": {"shape": (0, 5)},
        **SHAPES,
    },
    thorough=("first tile", "new maximum"),
    dtypes=[torch.float32, torch.float64],
    opcheck_shapes=((7, 70), (0, 5)),
    compile_shape=(7, 70),
    shape_for_threads=(65, 4001),
    wrong=[*LABELS, *bad_rows("maximum", "others", "picked")],
)


# --- linear_gradient_ -----------------------------------------------------------------------------


def gradient_case(
    shape=(7, 70), dtype=torch.float32, device="cpu", *, start=0, scale=1.0, softcap=None
) -> Case:
    """``dtype`` of the result, factors of both signs over five decades."""
    size, columns = shape
    wide = accumulate_dtype(dtype)
    x = values(shape, wide, device, scale=scale)
    if softcap is not None:
        x = (x / softcap).tanh() * softcap
    decades = 10.0 ** (torch.arange(size, device=device) % 6 - 5).to(wide)
    tensors = {
        "values": x,
        "labels": labels_of(size, columns, start, device),
        "shift": x.amax(1) if columns and size else x.new_zeros(size),
        "factor": values((size,), wide, device) * decades,
        "label": values((size,), wide, device) * decades,
        "out": torch.full(shape, 7.0, dtype=dtype, device=device),
    }
    return Case(tensors, {"start": start, "softcap": softcap})


def gradient_bounds(case: Case) -> dict:
    """As ``sums_bounds``."""
    x, shift, factor, label = (
        case.tensors[name].double() for name in ("values", "shift", "factor", "label")
    )
    eps, out = unit(case.tensors["values"].dtype), case.tensors["out"]
    column = case.tensors["labels"] - case.scalars["start"]
    inside = ((column >= 0) & (column < x.shape[1])).unsqueeze(1)
    column = column.clamp(0, x.shape[1] - 1).unsqueeze(1)
    relative, factor, label = x - shift.unsqueeze(1), factor.unsqueeze(1), label.unsqueeze(1)
    truth = factor * relative.exp()
    error = truth.abs() * (relative.abs() * U + FUNCTION + U) + factor.abs() * FLUSHED
    truth = truth.scatter(1, column, torch.where(inside, label, truth.gather(1, column)))
    error = error.scatter(1, column, torch.where(inside, 0.0, error.gather(1, column)))
    if case.scalars["softcap"] is not None:
        # the quotient, both factors and their product; where the cap is reached all are of 1
        tanh = x / case.scalars["softcap"]
        error = error * 1.001 + truth.abs() * 6 * U
        slope = (1 - tanh) * (1 + tanh)
        error, truth = error + truth.abs() * slope * 2 * U, truth * slope
    return {"out": (truth, error * eps * 1.001 + stored(truth, out.dtype))}


def gradient_is_close(case: Case) -> None:
    judged("linear_gradient_", case, ("out",), gradient_bounds(case))


GRADIENT = Op(
    name="linear_gradient_",
    make=gradient_case,
    judge=gradient_is_close,
    settings={
        "plain": {},
        "capped": {"softcap": 3.0},
        "last tile": {"start": 128_000, "shape": (9, 333)},
        "confident": {"scale": 30.0},
        "very confident": {"scale": 1e4},
        "at the cap": {"scale": 300.0, "softcap": 30.0},
        "no rows": {"shape": (0, 5)},
        **SHAPES,
        **{f"{name}, capped": {**shape, "softcap": 5.0} for name, shape in SHAPES.items()},
    },
    thorough=("plain", "capped"),
    dtypes=DTYPES,
    opcheck_shapes=((7, 70), (0, 5)),
    compile_shape=(7, 70),
    shape_for_threads=(65, 4001),
    wrong=[
        *LABELS,
        *bad_rows("shift", "factor", "label"),
        ("out-shape", put("out", lambda t: t[:, 1:]), "out"),
        ("out-integers", put("out", lambda t: t.int()), "out"),
        ("out-strides", put("out", lambda t: t.T.contiguous().T), "out"),
        *bad_numbers(softcap=(0.0, -1.0, math.inf)),
    ],
)
