"""Entries of the ops that write a gradient over the logits; tests/ops/test_in_place.py tests the
public calls above them.
"""

import math

import tolerances
import torch
from cases import NATIVE_DTYPES, Case, shifted, values
from judging import assert_matches_reference, assert_same_bits, assert_within, formula_of
from op_entries import Op
from row_cases import last_layer
from spoiling import bad_numbers, put

from sfron_fast.ops import registry as ops
from sfron_fast.ops import rows

OUTPUTS = ("total", "losses", "weights", "normaliser")


def strides(name):
    return put(name, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1))


# --- adaptive_cross_entropy_sum_ ------------------------------------------------------------------


def sum_case(
    shape=(9, 1, 7),
    dtype=torch.float32,
    device="cpu",
    *,
    temperature=0.5,
    floor=1e-6,
    scale=-1.75,
    spread=1.0,
) -> Case:
    _, _, labels = last_layer(shape, dtype, device)
    numbers = {"temperature": temperature, "floor": floor, "ignore_index": -100, "scale": scale}
    return Case({"logits": values(shape, dtype, device, scale=spread), "labels": labels}, numbers)


def sum_is_close(case: Case) -> None:
    """The kernel and its checked formula."""
    name, logits = "adaptive_cross_entropy_sum_", case.tensors["logits"]
    bounds = tolerances.cross_entropy_sum(*case.tensors.values(), *case.scalars.values())
    for kernel in (ops.default_kernel(name), rows.in_place_kernel(name, logits.dtype)):
        mine = case.clone()
        outputs = dict(zip(OUTPUTS, mine.run(kernel), strict=True))
        assert_within({**outputs, "gradient": mine.tensors["logits"]}, bounds)


def _swap_samples_and_tokens(case):
    for name, tensor in case.tensors.items():
        case.tensors[name] = tensor.transpose(0, 1).contiguous()


SUM = Op(
    name="adaptive_cross_entropy_sum_",
    make=sum_case,
    judge=sum_is_close,
    settings={
        "small": {},
        "one": {"shape": (1, 1, 1)},
        "edge": {"shape": (5, 1, 33)},
        "below a lane": {"shape": (5, 1, 31)},
        "blocks": {"shape": (3, 1, 4100)},
        "many rows": {"shape": (3000, 1, 3)},
        "vocabulary": {"shape": (3, 1, 32003)},
        "confident": {"spread": 30.0},
        "mean": {"temperature": 0.0},
        "steep": {"temperature": 2.0, "floor": 1e-2},
        "high floor": {"floor": 3.0},
        "nothing": {"scale": 0.0},
    },
    thorough=("small",),
    opcheck_shapes=((9, 1, 7),),
    compile_shape=(9, 1, 7),
    shape_for_threads=(200, 1, 501),
    wrong=[
        ("tokens", _swap_samples_and_tokens, "logits"),
        ("strides", strides("logits"), "logits"),
        ("integers", put("logits", lambda t: t.int()), "logits"),
        ("label", put("labels", lambda t: t + 7), "labels"),
        ("labels-dtype", put("labels", lambda t: t.int()), "labels"),
        ("labels-meta", put("labels", lambda t: t.to("meta")), "labels"),
        *bad_numbers(temperature=(-0.1,), floor=(0.0,), scale=(math.inf, -math.inf)),
    ],
)


# --- adaptive_cross_entropy_backward_ -------------------------------------------------------------


def backward_case(shape=(4, 3, 10), dtype=torch.float32, device="cpu") -> Case:
    _, _, labels = last_layer(shape, dtype, device)
    logits = values(shape, dtype, device)
    outputs = formula_of("adaptive_cross_entropy")(logits, labels, 0.5, 1e-6, -100)
    tensors = {
        "grad": torch.tensor(-0.7, device=device),
        "logits": logits,
        "labels": labels,
        "weights": outputs[2],
        "log_sums": outputs[4],
    }
    return Case(tensors, {"ignore_index": -100})


def same_as_out_of_place(case: Case) -> None:
    """The logits become the gradient that ``adaptive_cross_entropy_backward`` returns."""
    name = "adaptive_cross_entropy_backward"
    double = case.tensors["logits"].dtype == torch.float64
    kernel_of = ops.default_kernel if double else ops.op
    wanted = case.clone().run(kernel_of(name))
    case.run(kernel_of(f"{name}_"))
    assert_same_bits(case.tensors["logits"], wanted)


BACKWARD = Op(
    name="adaptive_cross_entropy_backward_",
    make=backward_case,
    judge=same_as_out_of_place,
    settings={"plain": {}, "long rows": {"shape": (3, 2, 4100)}},
    thorough=("plain",),
    opcheck_shapes=((4, 3, 10),),
    compile_shape=(4, 3, 10),
    shape_for_threads=(9, 7, 501),
    wrong=[
        ("grad", put("grad", lambda t: t.expand(2)), "grad"),
        ("strides", strides("logits"), "logits"),
        ("labels", put("labels", lambda t: t[:, 1:]), "labels"),
        ("weights", put("weights", lambda t: t[1:]), "weights"),
        ("log_sums", put("log_sums", lambda t: t[:, 1:]), "log_sums"),
    ],
)


# --- adaptive_cross_entropy_scale_ ----------------------------------------------------------------


def scale_case(
    shape=(4, 10), dtype=torch.float32, device="cpu", *, factor=-0.7, special=0, layout=None
) -> Case:
    gradient = values(shape, dtype, device, special=special)
    gradient = gradient if layout is None else layout(gradient)
    return Case({"gradient": gradient, "factor": torch.tensor(factor, device=device)}, {})


def scaled_like_the_formula(case: Case) -> None:
    assert_matches_reference(
        "adaptive_cross_entropy_scale_", case, ops.op("adaptive_cross_entropy_scale_")
    )


SCALE = Op(
    name="adaptive_cross_entropy_scale_",
    make=scale_case,
    judge=scaled_like_the_formula,
    settings={
        f"{shape} by {factor}{', misaligned' if layout else ''}": {
            "shape": shape,
            "factor": factor,
            "layout": layout,
            "special": 1,
        }
        for shape in ((0,), (1,), (31,), (5, 4099), (40, 1, 3000))
        for factor in (1.0, -2.5, 0.0, math.inf, math.nan)
        for layout in (None, shifted)
    }
    | {"plain": {}},
    thorough=("plain",),
    dtypes=NATIVE_DTYPES,
    opcheck_shapes=((4, 10),),
    compile_shape=(4, 10),
    shape_for_threads=(40, 3000),
    wrong=[
        ("factor", put("factor", lambda t: t.expand(2)), "factor"),
        ("integers", put("gradient", lambda t: t.int()), "gradient"),
        ("strides", put("gradient", lambda t: t[:, ::2]), "gradient"),
    ],
)
