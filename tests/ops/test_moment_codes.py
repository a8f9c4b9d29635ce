"""Moments in 8 bits: what the codes hold, how near runs with them stay, what masks keep."""

import math

import pytest
import torch
from cases import Case
from judging import assert_same_bits

from sfron_fast import functional
from sfron_fast.ops import moment_codes, reference

KINDS = {torch.int8: "signed", torch.uint8: "unsigned"}
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=KINDS.get)


def wide(shape, kind, seed=0, sigma=2.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(
        sigma * torch.randn(shape, generator=generator)
    )
    return x if kind == torch.int8 else x * x


@EACH_KIND
def test_a_code_is_near_over_its_octaves_and_unbiased(kind):
    """16 of exp_avg, 32 of its square."""
    x = wide((16, 320), kind, sigma=1.5)
    largest = torch.cat([p.abs().amax(1, keepdim=True).expand_as(p) for p in x.split(256, 1)], 1)
    inside = x.abs() > largest * (2.0**-15 if kind == torch.int8 else 2.0**-31)
    assert inside.double().mean() > 0.9
    total = torch.zeros_like(x, dtype=torch.float64)
    for step in range(1, 513):
        found = moment_codes.decode(*moment_codes.encode(x, step, kind)).double()
        assert ((found - x).abs() <= 0.125 * x.abs())[inside].all()
        total += found
    assert ((total / 512 - x).abs() < 0.005 * x.abs())[inside].all()


@EACH_KIND
def test_what_codes_hold_is_not_rounded(kind):
    """So a state that was saved in fp32 is made codes again, and nothing has changed."""
    codes, scales = moment_codes.encode(wide((9, 2, 160), kind), 5, kind)
    held = moment_codes.decode(codes, scales)
    for step in (None, *range(1, 60)):
        again, factors = moment_codes.encode(held, step, kind)
        assert torch.equal(again, codes)
        assert torch.equal(factors, scales)


def test_only_zero_is_coded_as_zero_where_a_root_divides():
    x = torch.full((1, 64), 1e-30)
    x[0, 0], x[0, 1] = 1.0, 0.0
    codes, _ = moment_codes.encode(x, 3, torch.uint8)
    assert codes[0, 0] == 255
    assert codes[0, 1] == 0
    assert (codes[0, 2:] == 1).all()


@EACH_KIND
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 3.4e38, math.inf, math.nan])
def test_extreme_groups(kind, value):
    x = torch.full((2, 64), value)
    x[1] = 1.0
    codes, scales = moment_codes.encode(x, 1, kind)
    found = moment_codes.decode(codes, scales)
    assert (found[1] == 1.0).all()
    if math.isfinite(value):
        assert (found[0] - value).abs().max() <= max(0.13 * value, 2.0**-140)
    else:
        assert not found[0].isfinite().any()


def test_groups_end_with_an_index_of_the_first_dimension():
    """So half of the rows have the groups that they have in the whole."""
    x = wide((8, 3, 128), torch.int8)
    _, scales = moment_codes.encode(x, None, torch.int8)
    assert scales.shape == (*moment_codes.scales_shape(x, 1)[:2],) == (8, 2)
    _, half = moment_codes.encode(x[4:], None, torch.int8)
    assert torch.equal(half, scales[4:])


@pytest.mark.parametrize(
    ("shape", "coded"),
    [((64,), False), ((4, 32), True), ((4, 33), False), ((8, 3, 3, 3), False), ((), False)]
    + [((2, 64, 3, 3), True), ((0, 64), False), ((64, 0), False)],
)
def test_which_weights_have_codes(shape, coded):
    assert moment_codes.has_codes(torch.empty(shape)) == coded


def adamw(param, grad, state, **settings):
    m, v, scales, count = state
    given = {"scales": [scales]} if scales is not None else {}
    functional.adamw_step_([param], [grad], [m], [v], [count], **given, **settings)


def fresh(shape):
    """exp_avg, exp_avg_sq, scales, step."""
    codes = [torch.zeros(shape, dtype=kind) for kind in KINDS]
    return *codes, torch.zeros(moment_codes.scales_shape(codes[0], 2)), torch.zeros(())


def test_a_masked_moment_moves_by_a_code_at_most():
    """Weights keep their bits; a neighbour may change the scale that a moment shares with it."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 320)
    param = torch.randn(shape, generator=generator)
    state = fresh(shape)
    for _ in range(20):
        adamw(param, torch.randn(shape, generator=generator), state, lr=1e-3)
    selected = torch.rand(shape, generator=generator) < 0.3
    for size in (1e-3, 1.0, 30.0):
        before = [t.clone() for t in (param, *state)]
        old = [moment_codes.decode(before[1 + k], before[3][..., k]) for k in range(2)]
        adamw(
            param,
            torch.randn(shape, generator=generator) * size,
            state,
            lr=1e-3,
            masks=[reference.pack_bits(selected)],
            freeze_masked=True,
        )
        assert_same_bits(param[~selected], before[0][~selected])
        for k in range(2):
            now = moment_codes.decode(state[k], state[2][..., k])
            unit = old[k].abs() * 0.125 + state[2][..., k].amax() * moment_codes.LEAST
            assert ((now - old[k]).abs() <= unit)[~selected].all()
    same = [t.clone() for t in state[:2]]
    nothing = reference.pack_bits(torch.zeros(shape, dtype=torch.bool))
    adamw(param, param, state, lr=1e-3, masks=[nothing], freeze_masked=True)
    assert all(torch.equal(a, b) for a, b in zip(same, state[:2], strict=True))


def test_runs_stay_near_those_in_fp32():
    """3,000 steps on gradients of wide range: nearer than other gradients would bring them."""
    shape, generator = (8, 256), torch.Generator().manual_seed(3)
    scale = torch.exp(torch.randn(shape[1], generator=generator)) * 1e-4
    mean = torch.randn(shape, generator=generator)
    states = {
        "codes": fresh(shape),
        "fp32": (torch.zeros(shape), torch.zeros(shape), None, torch.zeros(())),
        "other": (torch.zeros(shape), torch.zeros(shape), None, torch.zeros(())),
    }
    params = {name: torch.zeros(shape) for name in states}
    for _ in range(3000):
        grad, other = (
            scale * (mean + 5.0 * torch.randn(shape, generator=generator)) for _ in range(2)
        )
        for name, state in states.items():
            adamw(params[name], other if name == "other" else grad, state, lr=1e-3)
    base = params["fp32"].norm()
    apart = {name: (params[name] - params["fp32"]).norm() / base for name in ("codes", "other")}
    assert apart["codes"] < 0.1
    assert apart["codes"] < 0.7 * apart["other"]


def spoiled(edit) -> Case:
    shape = (3, 32)
    m, v, scales, count = fresh(shape)
    lists = {"params": [torch.ones(shape)], "grads": [torch.ones(shape)], "exp_avgs": [m]}
    lists |= {"exp_avg_sqs": [v], "steps": [count], "scales": [scales]}
    case = Case(lists, {"lr": 0.1})
    edit(case.tensors)
    return case


def put(name, value):
    return lambda lists: lists.update({name: [value]})


@pytest.mark.parametrize(
    ("edit", "argument"),
    [
        (put("scales", torch.zeros(3, 1, 3)), "scales"),
        (put("scales", torch.zeros(3, 1, 2, dtype=torch.float64)), "scales"),
        (put("scales", torch.empty(0)), "exp_avgs"),
        (put("exp_avgs", torch.zeros(3, 32)), "exp_avgs"),
        (put("exp_avg_sqs", torch.zeros(3, 32, dtype=torch.int8)), "exp_avg_sqs"),
        (put("max_exp_avg_sqs", torch.zeros(3, 32)), "max_exp_avg_sqs"),
        (lambda lists: lists.update(scales=[torch.zeros(3, 1, 2)] * 2), "scales"),
    ],
)
def test_refused_by_name(edit, argument):
    case = spoiled(edit)
    before = case.clone()
    with pytest.raises((ValueError, RuntimeError), match=rf"{argument}(\[0\])?: expected"):
        case.run(functional.adamw_step_)
    for (name, a), (_, b) in zip(case.flat(), before.flat(), strict=True):
        assert_same_bits(a, b, name)
