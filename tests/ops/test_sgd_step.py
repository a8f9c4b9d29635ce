import itertools
import math

import pytest
import tolerances
import torch
from cases import (
    DTYPES,
    LAYOUT_SHAPES,
    LAYOUTS,
    MIXED,
    NATIVE_DTYPES,
    OTHER_STATES,
    SIZES,
    Case,
    assert_all_entries_reject,
    assert_deterministic,
    assert_layout_does_not_matter,
    assert_matches_reference,
    assert_neighbours_untouched,
    assert_noncontiguous_is_right_or_refused,
    assert_opcheck,
    assert_refuses_leaf,
    assert_refuses_leaf_and_bumps_version,
    assert_same_bits,
    assert_same_case,
    assert_same_lists,
    bad_lists,
    bad_masks,
    bad_numbers,
    bad_scalar_tensors,
    bad_skipped,
    bad_tensor_numbers,
    blame,
    compiled_equals_eager,
    each_size,
    lazy_zeros,
    mask_bits,
    reject_params,
    shifted,
    value_list,
)

from sfron_fast import functional
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops

NUMBERS = {
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


def make(
    shapes=((3,), (65,)),
    dtype=torch.float32,
    device="cpu",
    *,
    special=False,
    masked=False,
    buffers=None,
    state=None,
    slow_save=False,
    slow_from=False,
    norm=None,
    grad_scale=None,
    found_inf=None,
    numbers=None,
    **plain,
) -> Case:
    def scalar(value):
        return None if value is None else torch.tensor(value, device=device)

    def optional(wanted, kind=dtype):
        return value_list(shapes, kind, device) if wanted else []

    buffers = plain.get("momentum", 0.0) > 0.0 if buffers is None else buffers
    tensors = {
        "params": value_list(shapes, dtype, device, special=special * 1),
        "grads": value_list(shapes, dtype, device, special=special * 2),
        "momentum_buffers": optional(buffers, state or dtype),
        "slow_save": optional(slow_save),
        "slow_from": optional(slow_from),
        "masks": (
            [reference.pack_bits(mask_bits(shape, device)) for shape in shapes] if masked else []
        ),
        "norm": scalar(norm),
        "grad_scale": scalar(grad_scale),
        "found_inf": scalar(found_inf),
        "numbers": None
        if numbers is None
        else torch.tensor(numbers, dtype=torch.float64, device=device),
        "skipped": None if norm is None else torch.tensor(3, device=device),
    }
    return Case(tensors, NUMBERS | plain)


FLAGS = {
    "plain": {},
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
    "clipped": {"norm": 20.0, "max_norm": 0.7},
    "clip not reached": {"norm": 0.3, "max_norm": 0.7},
    "norm without limit": {"norm": 3e38},
    "unscaled": {"grad_scale": 3.0, "momentum": 0.9},
    "no overflow": {"found_inf": 0.0},
    "slow out": {"slow_save": True, "momentum": 0.9},
    "slow in": {"slow_from": True, "slow_lr": 0.3},
    "slow in, far end": {"slow_from": True, "slow_lr": 0.7, "masked": True, "freeze_masked": True},
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
    },
    "numbers": {
        "numbers": [0.02, 0.1, 0.3],
        "slow_from": True,
        "masked": True,
        "freeze_masked": True,
        "lr": 9.0,
    },
    "norm is inf": {"norm": math.inf, "max_norm": 1.0, "momentum": 0.9, "slow_save": True},
    "norm is nan, slow in": {"norm": math.nan, "momentum": 0.9, "slow_from": True, "slow_lr": 0.3},
    "overflow, first": {"found_inf": 1.0, "momentum": 0.9, "first": True},
}


@pytest.mark.checklist("B9")
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, flags):
    for special in (False, True):
        case = make(MIXED, dtype, device, special=special, **FLAGS[flags])
        assert_matches_reference("sgd_step_", case, functional.sgd_step_)


@pytest.mark.parametrize(
    "flags", ["momentum", "nesterov, first", "frozen", "frozen, first", "overflow, first"]
)
@pytest.mark.parametrize(("dtype", "state"), OTHER_STATES, ids=str)
def test_matches_reference_with_a_state_of_another_dtype(device, dtype, state, flags):
    for special in (False, True):
        case = make(MIXED, dtype, device, special=special, state=state, **FLAGS[flags])
        assert_matches_reference("sgd_step_", case, functional.sgd_step_)


TORCH_FLAGS = [
    dict(zip(("momentum", "dampening", "nesterov", "weight_decay", "maximize"), flags, strict=True))
    for flags in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.01), (False, True)
    )
    if not (flags[2] and (flags[0] == 0.0 or flags[1] > 0.0))  # torch refuses these
]


@pytest.mark.parametrize(
    "flags", TORCH_FLAGS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items() if v) or "plain"
)
def test_matches_torch(device, flags):
    lr, steps = 0.05, 6
    mine = value_list([(1000,)], torch.float32, device)
    theirs = [p.clone().requires_grad_() for p in mine]
    buffers = [torch.full_like(p, math.nan) for p in mine] if flags["momentum"] else []
    optimizer = torch.optim.SGD(theirs, lr=lr, **flags)
    size = torch.zeros_like(mine[0])
    for step in range(steps):
        grads = value_list([(1000,)], torch.float32, device)
        theirs[0].grad = grads[0].clone()
        size = torch.maximum(size, mine[0].abs())
        optimizer.step()
        functional.sgd_step_(mine, grads, buffers, lr=lr, first=step == 0, **flags)
        terms = grads[0].abs() + (flags["momentum"] * buffers[0].abs() if buffers else 0.0)
        size = torch.maximum(size, torch.maximum(mine[0].abs(), lr * terms))
        error = (mine[0] - theirs[0].detach()).abs()
        bound = tolerances.optimizer_step(step + 1, size)
        assert (error <= bound).all(), float((error / bound).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """p = 1, g = 1 / grad_scale 2 + decay 1/2 p = 1; m = 1/2 2 + 1 = 2; p - 1/4 2 = 1/2; slow 0 +
    1/4
    (1/2 - 0) = 1/8.

    The masked-out neighbour: g = 1/2; m = 1/2 2 + 1/2 = 3/2; p - 3/8 = 5/8; slow 5/32. The next one
    is clipped only by the mask byte, not by its gradient of 10^4, and goes the same way.
    """
    p, m, slow, out = (
        torch.full((3,), x, dtype=dtype, device=device) for x in (1.0, 2.0, 0.0, 9.0)
    )
    grad = torch.tensor([1.0, 1.0, 1e4], dtype=dtype, device=device)
    functional.sgd_step_(
        [p],
        [grad],
        [m],
        lr=0.25,
        momentum=0.5,
        weight_decay=0.5,
        slow_save=[out],
        slow_from=[slow],
        slow_lr=0.25,
        masks=[torch.tensor([0b001], dtype=torch.uint8, device=device)],
        grad_scale=torch.tensor(2.0, device=device),
    )
    assert m.tolist() == [2.0, 1.5, 1.5]
    assert p.tolist() == [0.125, 0.15625, 0.15625]
    assert out.tolist() == [1.0] * 3


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_is_untouched(device, dtype, poison):
    for flags in (
        {},
        {"nesterov": True},
        {"maximize": True, "norm": 2.0, "max_norm": 1.0},
        {"momentum": 0.0},
    ):
        flags = {
            "momentum": 0.9,
            "weight_decay": 0.1,
            "masked": True,
            "freeze_masked": True,
        } | flags
        case = make(MIXED[:-1], dtype, device, **flags)
        chosen = [
            reference.unpack_bits(m, g.shape)
            for m, g in zip(case.tensors["masks"], case.tensors["grads"], strict=True)
        ]
        for grad, selected in zip(case.tensors["grads"], chosen, strict=True):
            grad.copy_(torch.where(selected, grad, poison))
        before = case.clone()
        case.run(functional.sgd_step_)
        for name in ("params", "momentum_buffers"):
            for new, old, selected in zip(
                case.tensors[name], before.tensors[name], chosen, strict=False
            ):
                assert torch.equal(new[~selected], old[~selected])
                assert torch.isfinite(new).all()
                assert not torch.equal(new[selected], old[selected]) or not selected.any()


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_counts_as_zero(device, dtype, poison):
    """Without ``freeze_masked`` the others move too, as if their gradient were 0, not 0 times inf."""
    flags = FLAGS["masked"] | {"norm": 2.0, "max_norm": 1.0, "maximize": True}
    clean = make(MIXED[:-1], dtype, device, **flags)
    dirty = clean.clone()
    for case, value in ((clean, 0.0), (dirty, poison)):
        for grad, mask in zip(case.tensors["grads"], case.tensors["masks"], strict=True):
            grad.copy_(torch.where(reference.unpack_bits(mask, grad.shape), grad, value))
        case.run(functional.sgd_step_)
    for name in ("params", "momentum_buffers"):
        assert_same_lists(
            [(name, t) for t in dirty.tensors[name]], [(name, t) for t in clean.tensors[name]]
        )
        assert all(torch.isfinite(t).all() for t in dirty.tensors[name])


@pytest.mark.parametrize(
    "reason", [{"norm": math.inf}, {"norm": math.nan}, {"found_inf": 1.0}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipped(device, dtype, reason):
    """Nothing moves but the slow weights: stored from, or interpolated with, the unchanged ones."""
    flags = {"momentum": 0.9, "weight_decay": 0.1, "max_norm": 1.0, "special": True, **reason}
    case = make(MIXED[:-1], dtype, device, slow_save=True, **flags)
    before = case.clone()
    case.tensors["skipped"] = counter = torch.tensor(3, device=device)
    case.run(functional.sgd_step_)
    assert int(counter) == 4
    for name in ("params", "momentum_buffers", "grads"):
        assert_same_lists(
            [(name, t) for t in case.tensors[name]], [(name, t) for t in before.tensors[name]]
        )
    for out, old in zip(case.tensors["slow_save"], before.tensors["params"], strict=True):
        assert_same_bits(out, old)
    case = make([(65,)], dtype, device, slow_from=True, slow_lr=0.25, **{**flags, "special": False})
    before = case.clone()
    case.run(functional.sgd_step_)
    slow, fast = before.tensors["slow_from"][0], before.tensors["params"][0]
    functional.interpolate_([slow], [fast], 0.25)
    assert_same_bits(case.tensors["params"][0], fast)


def test_momentum_after_a_skipped_first_step(device):
    """An uninitialised buffer is 0 after a skipped first step, never what the memory held."""
    buffer = torch.full((65,), math.nan, device=device)
    param, grad = torch.ones(65, device=device), torch.ones(65, device=device)
    found_inf = torch.ones((), device=device)
    functional.sgd_step_(
        [param], [grad], [buffer], lr=1.0, momentum=0.9, first=True, found_inf=found_inf
    )
    assert torch.equal(buffer, torch.zeros_like(buffer))
    assert torch.equal(param, torch.ones_like(param))


@pytest.mark.checklist("E2")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_opcheck(device, dtype):
    for flags in ("plain", "everything"):
        assert_opcheck("sgd_step_", make([(5,), (0,), (), (65,)], dtype, device, **FLAGS[flags]))


def test_compile(device):
    cases = [
        make([(5,), (0,), (70,)], torch.float32, device, **FLAGS["everything"]) for _ in range(3)
    ]
    assert compiled_equals_eager(ops.sgd_step_, cases) == 1


def test_compile_changing_numbers(device):
    """Numbers that change go in through ``numbers``: one compilation.

    (Of Python floats torch guards the value.)
    """
    cases = [
        make(device=device, slow_from=True, numbers=[0.1 + 0.1 * i, 0.01 * i, 0.9**i])
        for i in range(12)
    ]
    assert compiled_equals_eager(ops.sgd_step_, cases) == 1


def test_a_tensor_stands_for_the_numbers(device):
    flags = FLAGS["everything"]
    plain = [flags["lr"], flags["weight_decay"], flags["slow_lr"]]
    case = make(MIXED, torch.float32, device, **flags)
    other = case.clone()
    other.tensors["numbers"] = torch.tensor(plain, dtype=torch.float64, device=device)
    other.scalars |= {"lr": 1.0, "weight_decay": 1.0, "slow_lr": 1.0}
    case.run(functional.sgd_step_)
    other.run(functional.sgd_step_)
    other.tensors["numbers"] = None
    assert_same_case(other, case)


@pytest.mark.checklist("B7")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_deterministic(device, dtype, set_threads):
    assert_deterministic(
        make(MIXED, dtype, device, **FLAGS["everything"]), ops.sgd_step_, set_threads
    )


@each_size
def test_empty_odd_and_large(device, dtype, size):
    functional.sgd_step_([], [], lr=0.1)
    case = make(SIZES[size], dtype, device, **FLAGS["frozen" if size == "many" else "everything"])
    assert_matches_reference("sgd_step_", case.clone(), functional.sgd_step_)
    if size != "many":
        case = case.map(shifted)
        assert_matches_reference("sgd_step_", case, functional.sgd_step_)
        assert_neighbours_untouched(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    case = make(LAYOUT_SHAPES, dtype, device, **FLAGS["everything"])
    assert_layout_does_not_matter("sgd_step_", case, LAYOUTS[layout], functional.sgd_step_)
    if dtype != torch.float64:
        assert_noncontiguous_is_right_or_refused("sgd_step_", case)


LISTS = ("params", "grads", "momentum_buffers", "slow_save", "slow_from")
BAD = [
    *blame(bad_lists(*LISTS), ("params-short", "params-shape"), "grads"),
    *bad_masks(),
    *bad_tensor_numbers([0.1, 0.0, 1.0]),
    *bad_skipped(),
    *bad_scalar_tensors("norm", "grad_scale", "found_inf"),
    *bad_numbers(
        lr=(-1.0,),
        momentum=(-0.1,),
        weight_decay=(-0.1,),
        max_norm=(0.0, -1.0),
        slow_lr=(-0.1, 1.1),
    ),
]


@reject_params(BAD)
def test_rejects(edit, argument):
    assert_all_entries_reject("sgd_step_", lambda: make(**FLAGS["everything"]), edit, argument)


def test_version_counter():
    grad = torch.ones(5)
    assert_refuses_leaf_and_bumps_version(lambda p: functional.sgd_step_([p], [grad], lr=0.1))
    assert_refuses_leaf(
        lambda p: functional.sgd_step_([torch.ones(5)], [grad], [p], lr=0.1, momentum=0.9)
    )
    assert_refuses_leaf(
        lambda p: functional.sgd_step_([torch.ones(5)], [grad], lr=0.1, slow_save=[p])
    )


@pytest.mark.long
def test_index_arithmetic_above_2_31():
    if ops.kernel_for("sgd_step_", "cpu") != "native":
        pytest.skip("the reference would widen 2^31 elements to fp32")
    numel = 2**31 + 65
    param, grad = lazy_zeros(numel, torch.bfloat16), lazy_zeros(numel, torch.bfloat16)
    mask = lazy_zeros((numel + 7) // 8, torch.uint8)
    places = [0, 2**31 - 1, 2**31, numel - 1]
    grad[torch.tensor(places)] = 1.0
    for at in (places[0], places[2], places[3]):
        mask[at // 8] |= 1 << at % 8
    functional.sgd_step_([param], [grad], lr=0.5, masks=[mask])
    assert param[torch.tensor(places)].tolist() == [-0.5, 0.0, -0.5, -0.5]
    assert int(torch.count_nonzero(param)) == 3
