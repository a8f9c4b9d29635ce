"""What both optimizer steps must show beside what every op shows: masks, skipped steps, state of
another dtype.
"""

import math

import pytest
import torch
from cases import DTYPES, MIXED, OTHER_STATES
from judging import assert_same_bits, assert_same_lists
from op_table import LISTS

from sfron_fast import functional
from sfron_fast.ops import reference

SGD, ADAMW = LISTS["sgd_step_"], LISTS["adamw_step_"]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_POISON = pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
EACH_STEP = pytest.mark.parametrize("op", [SGD, ADAMW], ids=str)
STATE = {SGD.name: {"momentum": 0.9}, ADAMW.name: {"amsgrad": True}}
# lists that a step moves where a weight is selected; squares may stay where the gradient is tiny
MOVED = {SGD.name: ["params", "momentum_buffers"], ADAMW.name: ["params", "exp_avgs"]}
SQUARES = {SGD.name: [], ADAMW.name: ["exp_avg_sqs", "max_exp_avg_sqs"]}


def lists_of(case, *names):
    return [(name, t) for name in names for t in case.tensors[name]]


@pytest.mark.parametrize(
    ("op", "name"),
    [(SGD, n) for n in ("momentum", "nesterov, first", "frozen", "frozen, first")]
    + [(SGD, "overflow, first")]
    + [(ADAMW, n) for n in ("plain", "amsgrad", "frozen", "everything", "overflow")],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "state"), OTHER_STATES, ids=str)
def test_formula_with_a_state_of_another_dtype(device, dtype, state, op, name):
    for special in (False, True):
        case = op.make(MIXED, dtype, device, special=special, state=state, **op.settings[name])
        op.assert_right(case)


@EACH_POISON
@EACH_DTYPE
@pytest.mark.parametrize(
    ("op", "more"),
    [
        (SGD, {}),
        (SGD, {"nesterov": True}),
        (SGD, {"maximize": True, "norm": 2.0, "max_norm": 1.0}),
        (SGD, {"momentum": 0.0}),
        (ADAMW, {}),
        (ADAMW, {"decoupled": False}),
        (ADAMW, {"maximize": True, "norm": 2.0, "max_norm": 1.0}),
    ],
    ids=str,
)
def test_masked_out_is_untouched(device, op, more, dtype, poison):
    """With ``freeze_masked``, whatever the gradient of a weight that is not selected."""
    settings = {**STATE[op.name], "weight_decay": 0.1, "masked": True, "freeze_masked": True}
    case = op.make(MIXED[:-1], dtype, device, **settings | more)
    chosen = [
        reference.unpack_bits(m, g.shape)
        for m, g in zip(case.tensors["masks"], case.tensors["grads"], strict=True)
    ]
    for grad, selected in zip(case.tensors["grads"], chosen, strict=True):
        grad.copy_(torch.where(selected, grad, poison))
    before = case.clone()
    case.run(op.call)
    for name in (*MOVED[op.name], *SQUARES[op.name]):
        # without momentum there are no buffers
        assert len(case.tensors[name]) in (0, len(chosen))
        for new, old, selected in zip(
            case.tensors[name], before.tensors[name], chosen, strict=False
        ):
            assert torch.equal(new[~selected], old[~selected])
            assert torch.isfinite(new).all()
            if name in MOVED[op.name]:
                assert not torch.equal(new[selected], old[selected]) or not selected.any()


@EACH_POISON
@EACH_DTYPE
@EACH_STEP
def test_masked_out_counts_as_zero(device, op, dtype, poison):
    """Without ``freeze_masked`` the others move too, as if their gradient were 0, not 0 times
    inf.
    """
    settings = op.settings["masked"] | {"norm": 2.0, "max_norm": 1.0, "maximize": True}
    clean = op.make(MIXED[:-1], dtype, device, **settings)
    dirty = clean.clone()
    for case, value in ((clean, 0.0), (dirty, poison)):
        for grad, mask in zip(case.tensors["grads"], case.tensors["masks"], strict=True):
            grad.copy_(torch.where(reference.unpack_bits(mask, grad.shape), grad, value))
        case.run(op.call)
    names = (*MOVED[op.name], *SQUARES[op.name])
    assert_same_lists(lists_of(dirty, *names), lists_of(clean, *names))
    assert all(torch.isfinite(t).all() for _, t in lists_of(dirty, *names))


@pytest.mark.parametrize(
    "reason", [{"norm": math.inf}, {"norm": math.nan}, {"found_inf": 1.0}], ids=str
)
@EACH_DTYPE
@EACH_STEP
def test_skipped(device, op, dtype, reason):
    """Nothing moves, nor is the step counted, but the slow weights: stored from, or interpolated
    with, the unchanged ones.
    """
    clip = {"max_norm": 1.0} if "norm" in reason else {}
    settings = {**STATE[op.name], "weight_decay": 0.1, **clip, **reason}
    case = op.make(MIXED[:-1], dtype, device, slow_save=True, special=True, **settings)
    before = case.clone()
    case.tensors["skipped"] = counter = torch.tensor(3, device=device)
    case.run(op.call)
    assert int(counter) == 4
    names = ["grads", *MOVED[op.name], *SQUARES[op.name]] + ["steps"] * (op is ADAMW)
    assert_same_lists(lists_of(case, *names), lists_of(before, *names))
    for out, old in zip(case.tensors["slow_save"], before.tensors["params"], strict=True):
        assert_same_bits(out, old)
    case = op.make([(65,)], dtype, device, slow_from=True, slow_lr=0.25, **settings)
    before = case.clone()
    case.run(op.call)
    slow, fast = before.tensors["slow_from"][0], before.tensors["params"][0]
    functional.interpolate_([slow], [fast], 0.25)
    assert_same_bits(case.tensors["params"][0], fast)
