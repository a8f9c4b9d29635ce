"""Entries of the optimizer steps."""

import math

import torch
from cases import Case, mask_bits, value_list
from op_entries import ListOp
from spoiling import (
    bad_lists,
    bad_masks,
    bad_numbers,
    bad_scalar_tensors,
    bad_skipped,
    bad_tensor_numbers,
    blame,
)

from sfron_fast import functional
from sfron_fast.ops import moment_codes, reference, split_weights

BF16 = torch.bfloat16
COMPACT = {
    "weight_bits": 24,
    "codes": True,
    "masked": True,
    "weight_decay": 0.01,
    "norm": 5.0,
    "max_norm": 1.0,
    "slow_save": True,
    "slow_from": True,
    "slow_lr": 0.4,
}


def shared_tensors(
    shapes,
    dtype,
    device,
    *,
    masked=False,
    slow_save=False,
    slow_from=False,
    norm=None,
    grad_scale=None,
    found_inf=None,
    numbers=None,
    weight_bits=None,
    **plain,
) -> tuple[dict, dict]:
    """What both steps take beside their own lists, and the settings that are plain numbers.

    ``weight_bits``: of bf16 parameters; others are in one piece.
    """
    kind = split_weights.CORRECTIONS[weight_bits] if weight_bits and dtype == BF16 else None

    def scalar(value, dtype=torch.float32):
        return None if value is None else torch.tensor(value, dtype=dtype, device=device)

    def corrections(wanted):
        if kind is None or not wanted:
            return []
        bounds = torch.iinfo(kind)
        return [
            torch.randint(bounds.min, bounds.max + 1, shape, dtype=kind, device=device)
            for shape in shapes
        ]

    tensors = {
        "corrections": corrections(True),
        "slow_save": value_list(shapes, dtype, device) if slow_save else [],
        "slow_save_corrections": corrections(slow_save),
        "slow_from": value_list(shapes, dtype, device) if slow_from else [],
        "slow_from_corrections": corrections(slow_from),
        "masks": (
            [reference.pack_bits(mask_bits(shape, device)) for shape in shapes] if masked else []
        ),
        "norm": scalar(norm),
        "grad_scale": scalar(grad_scale),
        "found_inf": scalar(found_inf),
        "numbers": scalar(numbers, torch.float64),
        "skipped": None if norm is None else torch.tensor(3, device=device),
    }
    return tensors, plain


def with_codes(moments: dict, lists: dict, wanted) -> list:
    """Moments, in ``lists``, as codes where their rows allow it, else in fp32; their scales.

    ``moments``: the dtype of the codes by name.
    """
    if not wanted:
        return []
    scales = []
    for i in range(len(next(iter(lists.values())))):
        found = []
        for name, code in moments.items():
            moment = lists[name][i].float()
            if moment_codes.has_codes(moment):
                moment, factors = moment_codes.encode(moment, None, code)
                found.append(factors)
            lists[name][i] = moment
        nothing = torch.empty(0, device=moment.device)
        scales.append(torch.stack(found, -1).contiguous() if found else nothing)
    return scales


def bad_counts():
    def put(value):
        def edit(case):
            case.tensors["steps"][1] = value

        return edit

    return [
        ("steps-short", lambda case: case.tensors["steps"].pop(), "steps"),
        ("steps-two", put(torch.ones(2)), "steps[1]"),
        ("steps-integer", put(torch.ones((), dtype=torch.int64)), "steps[1]"),
    ]


def bad_corrections():
    """Beside parameters of fp32, as a good case has them."""

    def put(name, kind):
        def edit(case):
            case.tensors[name] = [torch.zeros(t.shape, dtype=kind) for t in case.tensors["params"]]

        return edit

    return [
        ("corrections-fp32", put("corrections", torch.int8), "params"),
        ("corrections-int32", put("corrections", torch.int32), "corrections"),
        (
            "slow_save_corrections-alone",
            put("slow_save_corrections", torch.int8),
            "slow_save_corrections",
        ),
        (
            "slow_from_corrections-alone",
            put("slow_from_corrections", torch.int8),
            "slow_from_corrections",
        ),
    ]


SHARED_WRONG = [
    *bad_corrections(),
    *bad_counts(),
    *bad_masks(),
    *bad_tensor_numbers([0.1, 0.0, 1.0]),
    *bad_skipped(),
    *bad_scalar_tensors("norm", "grad_scale", "found_inf"),
    *bad_numbers(lr=(-1.0,), weight_decay=(-0.1,), max_norm=(0.0, -1.0), slow_lr=(-0.1, 1.1)),
]
SHARED_FLAT = (
    "steps",
    "corrections",
    "slow_save",
    "slow_save_corrections",
    "slow_from",
    "slow_from_corrections",
    "masks",
)
SHARED_SETTINGS = {
    "plain": {},
    "clipped": {"norm": 20.0, "max_norm": 0.7},
    "clip not reached": {"norm": 0.3, "max_norm": 0.7},
    "slow in": {"slow_from": True, "slow_lr": 0.3},
    "slow in, far end": {"slow_from": True, "slow_lr": 0.7, "masked": True, "freeze_masked": True},
    "numbers": {"numbers": [0.02, 0.1, 0.3], "slow_from": True, "lr": 9.0}
    | {"masked": True, "freeze_masked": True},
    "24 bits, norm is nan": {"weight_bits": 24, "norm": math.nan}
    | {"slow_from": True, "slow_lr": 0.3},
    "32 bits": {"weight_bits": 32, "slow_save": True, "weight_decay": 0.1},
}
FLAT_SETTINGS = {
    "weight_bits": 24,
    "masked": True,
    "slow_save": True,
    "slow_from": True,
    "slow_lr": 0.3,
    "norm": 5.0,
    "max_norm": 1.0,
}


# --- sgd_step_ ------------------------------------------------------------------------------------

SGD_NUMBERS = {
    "lr": 0.1,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "first": False,
    "freeze_masked": False,
    "max_norm": math.inf,
    "slow_lr": 1.0,
}


def sgd_case(
    shapes=((3,), (65,)),
    dtype=torch.float32,
    device="cpu",
    *,
    special=False,
    buffers=None,
    state=None,
    codes=False,
    step=None,
    **settings,
) -> Case:
    """``step``: updates already applied, in counts; without it there are some where needed."""
    shared, plain = shared_tensors(shapes, dtype, device, **settings)
    buffers = plain.get("momentum", 0.0) > 0.0 if buffers is None else buffers
    lists = {"momentum_buffers": value_list(shapes, state or dtype, device) if buffers else []}
    codes = codes and buffers and dtype != torch.float64
    scales = with_codes({"momentum_buffers": torch.int8}, lists, codes)
    counted = codes or step is not None or shared["corrections"]
    tensors = {
        "params": value_list(shapes, dtype, device, special=special * 1),
        "grads": value_list(shapes, dtype, device, special=special * 2),
        **lists,
        "scales": scales,
        "steps": counts(shapes, step, device) if counted else [],
        **shared,
    }
    return Case(tensors, SGD_NUMBERS | plain)


def counts(shapes, step, device):
    steps = [float(7 * i % 1000 if step is None else step) for i in range(len(shapes))]
    return [torch.tensor(s, device=device) for s in steps]


SGD_SETTINGS = {
    **SHARED_SETTINGS,
    "momentum": {"momentum": 0.9},
    "momentum, first": {"momentum": 0.9, "first": True, "dampening": 0.5},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "nesterov, first": {"momentum": 0.9, "nesterov": True, "first": True},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "decay": {"weight_decay": 5e-4},
    "maximize": {"maximize": True, "momentum": 0.9, "weight_decay": 0.1},
    "masked": {"masked": True, "momentum": 0.9, "weight_decay": 0.1},
    "frozen": {"masked": True, "momentum": 0.9, "weight_decay": 0.1, "freeze_masked": True},
    "frozen without momentum": {"masked": True, "weight_decay": 0.1, "freeze_masked": True},
    "frozen, first": {"masked": True, "momentum": 0.9, "freeze_masked": True, "first": True},
    "frozen without mask": {"momentum": 0.9, "freeze_masked": True},
    "norm without limit": {"norm": 3e38},
    "unscaled": {"grad_scale": 3.0, "momentum": 0.9},
    "no overflow": {"found_inf": 0.0},
    "slow out": {"slow_save": True, "momentum": 0.9},
    "slow out and in": {"slow_save": True, "slow_from": True, "slow_lr": 0.5},
    "everything": {
        "masked": True,
        "momentum": 0.9,
        "dampening": 0.1,
        "weight_decay": 0.01,
        "nesterov": True,
        "maximize": True,
        "norm": 5.0,
        "max_norm": 1.0,
        "grad_scale": 7.0,
        "found_inf": 0.0,
        "slow_save": True,
        "slow_from": True,
        "slow_lr": 0.4,
        "lr": 0.03,
        "step": 3,
    },
    "norm is inf": {"norm": math.inf, "max_norm": 1.0, "momentum": 0.9, "slow_save": True},
    "norm is nan, slow in": {"norm": math.nan, "momentum": 0.9, "slow_from": True, "slow_lr": 0.3},
    "overflow, first": {"found_inf": 1.0, "momentum": 0.9, "first": True},
    "compact": {**COMPACT, "momentum": 0.9},
    "codes, first": {"codes": True, "momentum": 0.9, "first": True},
    "codes, frozen, first": {"codes": True, "masked": True, "freeze_masked": True}
    | {"momentum": 0.9, "nesterov": True, "first": True},
    "codes, overflow, first": {"codes": True, "found_inf": 1.0, "momentum": 0.9, "first": True},
}


SGD_STEP = ListOp(
    name="sgd_step_",
    call=functional.sgd_step_,
    make=sgd_case,
    settings=SGD_SETTINGS,
    thorough=("compact", "plain", "everything"),
    many="frozen",
    like="params",
    flat=("grads", "momentum_buffers", *SHARED_FLAT),
    flat_settings={**FLAT_SETTINGS, "momentum": 0.9, "step": 3},
    in_graph=("params",),
    numbers=("lr", "weight_decay", "slow_lr"),
    wrong=[
        *blame(
            bad_lists("params", "grads", "momentum_buffers", "slow_save", "slow_from"),
            "params",
            "grads",
        ),
        *bad_numbers(momentum=(-0.1,)),
        *SHARED_WRONG,
    ],
)


# --- adamw_step_ ----------------------------------------------------------------------------------

ADAMW_NUMBERS = {
    "lr": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled": True,
    "maximize": False,
    "freeze_masked": False,
    "max_norm": math.inf,
    "slow_lr": 1.0,
}


def adamw_case(
    shapes=((3,), (65,)),
    dtype=torch.float32,
    device="cpu",
    *,
    special=False,
    amsgrad=False,
    state=None,
    codes=False,
    step=None,
    **settings,
) -> Case:
    """``step``: updates already applied; without it a different number for each tensor."""
    shared, plain = shared_tensors(shapes, dtype, device, **settings)

    def squares(number):
        return [v * v for v in value_list(shapes, state or dtype, device, special=special * number)]

    lists = {
        "exp_avgs": value_list(shapes, state or dtype, device, special=special * 3),
        "exp_avg_sqs": squares(4),
    }
    kinds = {"exp_avgs": torch.int8, "exp_avg_sqs": torch.uint8}
    scales = with_codes(kinds, lists, codes and dtype != torch.float64)
    tensors = {
        "params": value_list(shapes, dtype, device, special=special * 1),
        "grads": value_list(shapes, dtype, device, special=special * 2),
        **lists,
        "max_exp_avg_sqs": squares(5) if amsgrad else [],
        "scales": scales,
        "steps": counts(shapes, step, device),
        **shared,
    }
    return Case(tensors, ADAMW_NUMBERS | plain)


ADAMW_SETTINGS = {
    **SHARED_SETTINGS,
    "first step": {"step": 0},
    "late step": {"step": 2**24 - 2},
    "amsgrad": {"amsgrad": True},
    "decoupled decay": {"weight_decay": 0.01},
    "L2 decay": {"weight_decay": 0.01, "decoupled": False},
    "Adam without decay": {"decoupled": False},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "betas below a half": {"beta1": 0.3, "beta2": 0.25},
    "betas 0": {"beta1": 0.0, "beta2": 0.0},
    "eps 0": {"eps": 0.0},
    "masked": {"masked": True, "weight_decay": 0.1, "amsgrad": True},
    "frozen": {"masked": True, "weight_decay": 0.1, "amsgrad": True, "freeze_masked": True},
    "frozen, L2": {"masked": True, "weight_decay": 0.1, "decoupled": False, "freeze_masked": True},
    "frozen without mask": {"freeze_masked": True},
    "unscaled": {"grad_scale": 3.0, "found_inf": 0.0},
    "slow out": {"slow_save": True},
    "everything": {
        "masked": True,
        "amsgrad": True,
        "weight_decay": 0.01,
        "decoupled": False,
        "maximize": True,
        "norm": 5.0,
        "max_norm": 1.0,
        "grad_scale": 7.0,
        "found_inf": 0.0,
        "slow_save": True,
        "slow_from": True,
        "slow_lr": 0.4,
        "lr": 0.03,
        "eps": 1e-3,
    },
    "norm is inf": {"norm": math.inf, "max_norm": 1.0, "slow_save": True, "amsgrad": True},
    "norm is nan, slow in": {"norm": math.nan, "slow_from": True, "slow_lr": 0.3},
    "overflow": {"found_inf": 1.0},
    "compact": COMPACT,
    "codes": {"codes": True},
    "codes, first step": {"codes": True, "step": 0},
    "codes, frozen, L2": {"codes": True, "masked": True, "freeze_masked": True}
    | {"weight_decay": 0.1, "decoupled": False},
    "codes, overflow": {"codes": True, "found_inf": 1.0, "slow_save": True},
    "24 bits, amsgrad": {"weight_bits": 24, "amsgrad": True, "masked": True, "freeze_masked": True},
}


MOMENTS = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
ADAMW_STEP = ListOp(
    name="adamw_step_",
    call=functional.adamw_step_,
    make=adamw_case,
    settings=ADAMW_SETTINGS,
    thorough=("compact", "plain", "everything"),
    many="plain",
    like="params",
    flat=("grads", *MOMENTS, *SHARED_FLAT),
    flat_settings={**FLAT_SETTINGS, "amsgrad": True},
    in_graph=("params",),
    numbers=("lr", "weight_decay", "slow_lr"),
    wrong=[
        *blame(
            bad_lists("params", "grads", *MOMENTS, "slow_save", "slow_from"),
            "params",
            "grads",
        ),
        *bad_numbers(beta1=(-0.1, 1.0), beta2=(-0.1, 1.0), eps=(-1.0,)),
        *SHARED_WRONG,
    ],
)
