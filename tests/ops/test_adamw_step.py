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


def make(
    shapes=((3,), (65,)),
    dtype=torch.float32,
    device="cpu",
    *,
    special=False,
    masked=False,
    amsgrad=False,
    state=None,
    step=None,
    slow_save=False,
    slow_from=False,
    norm=None,
    grad_scale=None,
    found_inf=None,
    numbers=None,
    **plain,
) -> Case:
    """``step``: updates already applied; without it a different number for each tensor."""

    def scalar(value):
        return None if value is None else torch.tensor(value, device=device)

    def squares(number):
        return [v * v for v in value_list(shapes, state or dtype, device, special=special * number)]

    steps = [float(7 * i % 1000 if step is None else step) for i in range(len(shapes))]
    tensors = {
        "params": value_list(shapes, dtype, device, special=special * 1),
        "grads": value_list(shapes, dtype, device, special=special * 2),
        "exp_avgs": value_list(shapes, state or dtype, device, special=special * 3),
        "exp_avg_sqs": squares(4),
        "max_exp_avg_sqs": squares(5) if amsgrad else [],
        "steps": [scalar(s) for s in steps],
        "slow_save": value_list(shapes, dtype, device) if slow_save else [],
        "slow_from": value_list(shapes, dtype, device) if slow_from else [],
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
    "clipped": {"norm": 20.0, "max_norm": 0.7},
    "clip not reached": {"norm": 0.3, "max_norm": 0.7},
    "unscaled": {"grad_scale": 3.0, "found_inf": 0.0},
    "slow out": {"slow_save": True},
    "slow in": {"slow_from": True, "slow_lr": 0.3},
    "slow in, far end": {"slow_from": True, "slow_lr": 0.7, "masked": True, "freeze_masked": True},
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
    "numbers": {
        "numbers": [0.02, 0.1, 0.3],
        "slow_from": True,
        "masked": True,
        "freeze_masked": True,
        "lr": 9.0,
    },
    "norm is inf": {"norm": math.inf, "max_norm": 1.0, "slow_save": True, "amsgrad": True},
    "norm is nan, slow in": {"norm": math.nan, "slow_from": True, "slow_lr": 0.3},
    "overflow": {"found_inf": 1.0},
}


@pytest.mark.checklist("B9")
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, flags):
    for special in (False, True):
        case = make(MIXED, dtype, device, special=special, **FLAGS[flags])
        assert_matches_reference("adamw_step_", case, functional.adamw_step_)


@pytest.mark.parametrize("flags", ["plain", "amsgrad", "frozen", "everything", "overflow"])
@pytest.mark.parametrize(("dtype", "state"), OTHER_STATES, ids=str)
def test_matches_reference_with_a_state_of_another_dtype(device, dtype, state, flags):
    for special in (False, True):
        case = make(MIXED, dtype, device, special=special, state=state, **FLAGS[flags])
        assert_matches_reference("adamw_step_", case, functional.adamw_step_)


TORCH_FLAGS = [
    dict(zip(("decoupled", "amsgrad", "weight_decay", "maximize"), flags, strict=True))
    for flags in itertools.product((True, False), (False, True), (0.0, 0.01), (False, True))
]


@pytest.mark.parametrize(
    "flags", TORCH_FLAGS, ids=lambda f: ",".join(f"{k}={v}" for k, v in f.items())
)
def test_matches_torch(device, flags):
    """Size of an update: lr / (1 - beta1^t) (|m| + |g|) / (sqrt(v) / sqrt(1 - beta2^t) + eps), as m
    may cancel.
    """
    lr, beta1, beta2, eps, steps = 0.01, 0.9, 0.99, 1e-8, 6
    mine = value_list([(1000,)], torch.float32, device)
    first, second = [torch.zeros_like(mine[0])], [torch.zeros_like(mine[0])]
    largest = [torch.zeros_like(mine[0])] if flags["amsgrad"] else []
    count = [torch.zeros((), device=device)]
    theirs = [p.clone().requires_grad_() for p in mine]
    options = {k: v for k, v in flags.items() if k != "decoupled"}
    kind = torch.optim.AdamW if flags["decoupled"] else torch.optim.Adam
    optimizer = kind(theirs, lr=lr, betas=(beta1, beta2), eps=eps, **options)
    size = torch.zeros_like(mine[0])
    for step in range(steps):
        grads = value_list([(1000,)], torch.float32, device)
        theirs[0].grad = grads[0].clone()
        size = torch.maximum(size, mine[0].abs())
        optimizer.step()
        functional.adamw_step_(
            mine,
            grads,
            first,
            second,
            count,
            largest,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            decoupled=flags["decoupled"],
            weight_decay=flags["weight_decay"],
            maximize=flags["maximize"],
        )
        root = (largest or second)[0].sqrt() / math.sqrt(1 - beta2 ** (step + 1)) + eps
        update = lr / (1 - beta1 ** (step + 1)) * (first[0].abs() + grads[0].abs()) / root
        size = torch.maximum(size, torch.maximum(mine[0].abs(), update))
        error = (mine[0] - theirs[0].detach()).abs()
        bound = tolerances.optimizer_step(step + 1, size)
        assert (error <= bound).all(), float((error / bound).max())
    assert count[0].item() == steps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """First step, betas 1/2 and 3/4, eps 0, g = 2: m = 0 + 1/2 2 = 1; v = 1/4 2^2 = 1.

    Update 1/4 (1 / (1 - 1/2)) / (sqrt(1) / sqrt(1 - 3/4)) = 1/4; decay 2 (1 - 1/4 1) = 3/2;
    together 5/4. Masked out g = 0 leaves m = v = 0, where eps 0 would give 0 / 0, so that one is
    frozen: 2.
    """
    p, m, v = (torch.full((2,), x, dtype=dtype, device=device) for x in (2.0, 0.0, 0.0))
    grad, step = (
        torch.tensor([2.0, 1e4], dtype=dtype, device=device),
        torch.zeros((), device=device),
    )
    functional.adamw_step_(
        [p],
        [grad],
        [m],
        [v],
        [step],
        lr=0.25,
        beta1=0.5,
        beta2=0.75,
        eps=0.0,
        weight_decay=1.0,
        masks=[torch.tensor([0b01], dtype=torch.uint8, device=device)],
        freeze_masked=True,
    )
    assert m.tolist() == [1.0, 0.0]
    assert v.tolist() == [1.0, 0.0]
    assert p.tolist() == [1.25, 2.0]
    assert step.item() == 1.0


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_is_untouched(device, dtype, poison):
    for flags in ({}, {"decoupled": False}, {"maximize": True, "norm": 2.0, "max_norm": 1.0}):
        flags = {
            "amsgrad": True,
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
        case.run(functional.adamw_step_)
        for name in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"):
            for new, old, selected in zip(
                case.tensors[name], before.tensors[name], chosen, strict=True
            ):
                assert torch.equal(new[~selected], old[~selected])
                assert torch.isfinite(new).all()
                if name in ("params", "exp_avgs"):
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
        case.run(functional.adamw_step_)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        assert_same_lists(
            [(name, t) for t in dirty.tensors[name]], [(name, t) for t in clean.tensors[name]]
        )
        assert all(torch.isfinite(t).all() for t in dirty.tensors[name])


@pytest.mark.parametrize(
    "reason", [{"norm": math.inf}, {"norm": math.nan}, {"found_inf": 1.0}], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_skipped(device, dtype, reason):
    """Nothing moves, nor is the step counted, but the slow weights are stored or interpolated."""
    flags = {"amsgrad": True, "weight_decay": 0.1, "max_norm": 1.0, "special": True, **reason}
    case = make(MIXED[:-1], dtype, device, slow_save=True, **flags)
    before = case.clone()
    case.tensors["skipped"] = counter = torch.tensor(3, device=device)
    case.run(functional.adamw_step_)
    assert int(counter) == 4
    for name in ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps", "grads"):
        assert_same_lists(
            [(name, t) for t in case.tensors[name]], [(name, t) for t in before.tensors[name]]
        )
    for out, old in zip(case.tensors["slow_save"], before.tensors["params"], strict=True):
        assert_same_bits(out, old)
    case = make([(65,)], dtype, device, slow_from=True, slow_lr=0.25, **{**flags, "special": False})
    before = case.clone()
    case.run(functional.adamw_step_)
    slow, fast = before.tensors["slow_from"][0], before.tensors["params"][0]
    functional.interpolate_([slow], [fast], 0.25)
    assert_same_bits(case.tensors["params"][0], fast)


@pytest.mark.checklist("E2")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_opcheck(device, dtype):
    for flags in ("plain", "everything"):
        assert_opcheck("adamw_step_", make([(5,), (0,), (), (65,)], dtype, device, **FLAGS[flags]))


def test_compile(device):
    cases = [
        make([(5,), (0,), (70,)], torch.float32, device, **FLAGS["everything"]) for _ in range(3)
    ]
    assert compiled_equals_eager(ops.adamw_step_, cases) == 1


def test_compile_changing_numbers(device):
    """Numbers that change go in through ``numbers``: one compilation.

    (Of Python floats torch guards the value.)
    """
    cases = [
        make(device=device, slow_from=True, numbers=[0.1 + 0.1 * i, 0.01 * i, 0.9**i])
        for i in range(12)
    ]
    assert compiled_equals_eager(ops.adamw_step_, cases) == 1


def test_a_tensor_stands_for_the_numbers(device):
    flags = FLAGS["everything"]
    plain = [flags["lr"], flags["weight_decay"], flags["slow_lr"]]
    case = make(MIXED, torch.float32, device, **flags)
    other = case.clone()
    other.tensors["numbers"] = torch.tensor(plain, dtype=torch.float64, device=device)
    other.scalars |= {"lr": 1.0, "weight_decay": 1.0, "slow_lr": 1.0}
    case.run(functional.adamw_step_)
    other.run(functional.adamw_step_)
    other.tensors["numbers"] = None
    assert_same_case(other, case)


@pytest.mark.checklist("B7")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_deterministic(device, dtype, set_threads):
    assert_deterministic(
        make(MIXED, dtype, device, **FLAGS["everything"]), ops.adamw_step_, set_threads
    )


@each_size
def test_empty_odd_and_large(device, dtype, size):
    functional.adamw_step_([], [], [], [], [], lr=0.1)
    case = make(SIZES[size], dtype, device, **FLAGS["plain" if size == "many" else "everything"])
    assert_matches_reference("adamw_step_", case.clone(), functional.adamw_step_)
    if size != "many":
        case = case.map(shifted)
        assert_matches_reference("adamw_step_", case, functional.adamw_step_)
        assert_neighbours_untouched(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device, dtype, layout):
    case = make(LAYOUT_SHAPES, dtype, device, **FLAGS["everything"])
    assert_layout_does_not_matter("adamw_step_", case, LAYOUTS[layout], functional.adamw_step_)
    if dtype != torch.float64:
        assert_noncontiguous_is_right_or_refused("adamw_step_", case)


def bad_step(case, value):
    case.tensors["steps"][1] = value


LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "slow_save", "slow_from")
BAD = [
    *blame(bad_lists(*LISTS), ("params-short", "params-shape"), "grads"),
    *bad_masks(),
    *bad_tensor_numbers([0.1, 0.0, 1.0]),
    *bad_skipped(),
    *bad_scalar_tensors("norm", "grad_scale", "found_inf"),
    ("steps-short", lambda case: case.tensors["steps"].pop(), "steps"),
    ("steps-two", lambda case: bad_step(case, torch.ones(2)), "steps[1]"),
    ("steps-integer", lambda case: bad_step(case, torch.ones((), dtype=torch.int64)), "steps[1]"),
    *bad_numbers(
        lr=(-1.0,), beta1=(-0.1, 1.0), beta2=(-0.1, 1.0), eps=(-1.0,), weight_decay=(-0.1,)
    ),
    *bad_numbers(max_norm=(0.0, -1.0), slow_lr=(-0.1, 1.1)),
]


@reject_params(BAD)
def test_rejects(edit, argument):
    assert_all_entries_reject("adamw_step_", lambda: make(**FLAGS["everything"]), edit, argument)


def test_version_counter():
    def step(**written):
        ones = {name: [torch.ones(5)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
        functional.adamw_step_(
            **ones | {name: [t] for name, t in written.items()}, steps=[torch.ones(())], lr=0.1
        )

    assert_refuses_leaf_and_bumps_version(lambda p: step(params=p))
    for name in ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "slow_save"):
        assert_refuses_leaf(lambda p, name=name: step(**{name: p}))
