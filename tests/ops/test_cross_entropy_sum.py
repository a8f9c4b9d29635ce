"""The ops behind ``adaptive_cross_entropy_sum_`` and ``adaptive_cross_entropy(inplace=True)``."""

import math
from functools import partial

import pytest
import tolerances as tol
import torch
from cases import (
    DTYPES,
    NATIVE_DTYPES,
    Case,
    assert_all_entries_reject,
    assert_deterministic,
    assert_noncontiguous_is_right_or_refused,
    assert_opcheck,
    assert_same_bits,
    assert_within,
    bad_numbers,
    reject_params,
    shifted,
    values,
)
from row_cases import last_layer

from sfron_fast import adaptive_cross_entropy_sum_
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
OUTPUTS = ("total", "losses", "weights", "normaliser")


@each_dtype
def test_sum_hand_example(device, dtype):
    """Rows (0, 0) and (0, ln 3): losses ln 2 and ln(4/3). Temperature 1: r_i = 1 / l_i, so sum r_i
    l_i
    = 2.

    The gradients are scale r_1 (1/2 - 1, 1/2) and scale r_2 (1/4, 3/4 - 1).
    """
    raw = [1 / math.log(2), 1 / math.log(4 / 3)]
    leaf = torch.tensor(
        [[0.0, 0.0], [0.0, math.log(3)]], dtype=dtype, device=device, requires_grad=True
    )
    logits = leaf * 1.0
    loss, normaliser = adaptive_cross_entropy_sum_(
        logits, torch.tensor([0, 1], device=device), 1.0, scale=-3.0
    )
    near = {"rel": 8 * tol.EPS[dtype]}  # ln 3 is rounded to the dtype
    assert loss.item() == pytest.approx(-6.0, **near)
    assert normaliser.item() == pytest.approx(sum(raw), **near)
    expected = [1.5 * raw[0], -1.5 * raw[0], -0.75 * raw[1], 0.75 * raw[1]]
    assert logits.flatten().tolist() == pytest.approx(expected, **near)
    loss.backward()
    assert leaf.grad.flatten().tolist() == pytest.approx(expected, **near)


def sum_case(
    shape=(9, 1, 7),
    dtype=torch.float32,
    device="cpu",
    *,
    temperature=0.5,
    floor=1e-6,
    scale=-1.75,
    spread=1.0,
):
    _, _, labels = last_layer(shape, dtype, device)
    numbers = {"temperature": temperature, "floor": floor, "ignore_index": -100, "scale": scale}
    return Case({"logits": values(shape, dtype, device, scale=spread), "labels": labels}, numbers)


SUMS = {
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
}


@each_dtype
@pytest.mark.parametrize("name", SUMS)
def test_sum_matches_truth(device, dtype, name):
    case = sum_case(**SUMS[name], dtype=dtype, device=device)
    bounds = tol.cross_entropy_sum(*case.tensors.values(), *case.scalars.values())
    kernels = [ops.default_kernel("adaptive_cross_entropy_sum_")]
    kernels += [] if dtype == torch.float64 else [ops.adaptive_cross_entropy_sum_]
    for kernel in kernels:
        mine = case.clone()
        outputs = dict(zip(OUTPUTS, mine.run(kernel), strict=True))
        assert_within({**outputs, "gradient": mine.tensors["logits"]}, bounds)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_sum_has_the_values_of_the_forward_pass(device, dtype):
    case = sum_case((40, 1, 1000), dtype, device)
    _, per_sample, weights, log_normaliser, _ = ops.adaptive_cross_entropy(
        *case.tensors.values(), 0.5, 1e-6, -100
    )
    outputs = case.run(ops.adaptive_cross_entropy_sum_)
    for got, wanted in zip(
        outputs[1:], (per_sample, weights, log_normaliser.exp().float()), strict=True
    ):
        if device == "cpu":
            assert_same_bits(got, wanted)
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@each_dtype
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_row_without_a_label_is_zero(device, dtype, poison):
    """Whatever its logits: 0, not 0 times inf; a NaN in a row with a label shows in everything it
    enters.
    """
    case = sum_case((6, 1, 70), dtype, device)
    case.tensors["labels"].clamp_(min=0)
    case.tensors["labels"][2] = -100
    clean, other = case.clone(), case.clone()
    wanted = clean.run(reference.adaptive_cross_entropy_sum_)
    other.tensors["logits"][2] = poison
    got = other.run(partial(kernel_of, dtype))
    assert torch.isfinite(other.tensors["logits"]).all()
    assert not other.tensors["logits"][2].any()
    torch.testing.assert_close(got[0], wanted[0])
    assert got[1][2] == got[2][2] == 0
    case.tensors["logits"][1, 0, 3] = math.nan
    loss, per_sample, _, normaliser = case.run(partial(kernel_of, dtype))
    assert loss.isnan()
    assert normaliser.isnan()
    assert per_sample.isnan().tolist() == [False, True, False, False, False, False]
    assert case.tensors["logits"][1].isnan().all()
    assert torch.isfinite(case.tensors["logits"][0]).all()


def kernel_of(dtype, **arguments):
    name = "adaptive_cross_entropy_sum_"
    return (ops.default_kernel(name) if dtype == torch.float64 else getattr(ops, name))(**arguments)


@pytest.mark.parametrize("shape", [(0,), (1,), (31,), (5, 4099), (40, 1, 3000)], ids=str)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_scale(device, dtype, shape, set_threads):
    set_threads(2)
    for layout in (lambda t: t, shifted):
        gradient = layout(values(shape, dtype, device, special=1))
        for factor in (1.0, -2.5, 0.0, math.inf, math.nan):
            got, wanted = gradient.clone(), gradient.clone()
            number = torch.tensor(factor, device=device)
            ops.adaptive_cross_entropy_scale_(got, number)
            if factor != 1.0:
                reference.adaptive_cross_entropy_scale_(wanted, number)
            assert_same_bits(got, wanted)


def test_scale_by_1_touches_nothing(device):
    """A signalling NaN, which even a product with 1 would change."""
    bits = torch.full((70,), 0x7F800001, dtype=torch.int32, device=device)
    ops.adaptive_cross_entropy_scale_(bits.view(torch.float32), torch.ones((), device=device))
    assert (bits == 0x7F800001).all()


def test_sum_arguments():
    labels = torch.zeros(3, dtype=torch.int64)
    work = torch.randn(3, 4, requires_grad=True) * 1.0
    for scale in (math.nan, math.inf, -math.inf, "two"):
        with pytest.raises(ValueError, match=r"^scale: expected a number in .*found"):
            adaptive_cross_entropy_sum_(work, labels, scale=scale)
    with pytest.raises(ValueError, match=r"^logits: expected \[samples, classes\].*inplace=True"):
        adaptive_cross_entropy_sum_(work.unsqueeze(0), labels.unsqueeze(0))
    half = work.half()
    adaptive_cross_entropy_sum_(
        half * 1, labels, 1.5, scale=65.0
    )  # 65 * 1e-6 ** -0.5 = 65000, just within fp16
    for numbers in ({"scale": -66.0}, {"temperature": 2.0}, {"temperature": 1e3}, {"floor": 1e-8}):
        with pytest.raises(
            ValueError,
            match=r"^floor: expected weights below 1e38.5 and gradients below 1e4.8, found",
        ):
            adaptive_cross_entropy_sum_(
                half, labels, **{"temperature": 1.5, "scale": 60.0, **numbers}
            )
    assert torch.equal(half, work.half())
    adaptive_cross_entropy_sum_(half * 1, labels, 1.0, scale=-6e4)
    adaptive_cross_entropy_sum_(half, labels, 1e3, floor=1.0, scale=0.0)
    with pytest.raises(ValueError, match=r"^floor: expected weights below"):
        adaptive_cross_entropy_sum_(work, labels, 7.0)
    adaptive_cross_entropy_sum_(work.double(), labels, 7.0)
    with pytest.raises(
        ValueError,
        match=r"^temperature: expected weights of losses up to 100 above 1e-38, found 1e-4",
    ):
        adaptive_cross_entropy_sum_(work, labels, 20.0, floor=1.0)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_sum_gradients_stay_below_the_promised_size(temperature):
    """What ``floor`` is checked against: |scale| max(1, floor ** (1 - temperature)), whatever the
    loss.
    """
    margin = torch.linspace(-30, 30, 2001, dtype=torch.float64)
    logits = torch.stack([margin, torch.zeros_like(margin)], 1).requires_grad_() * 1.0
    for floor in (1e-6, 1e-2, 2.0):
        work = logits * 1.0
        adaptive_cross_entropy_sum_(
            work, torch.zeros(2001, dtype=torch.int64), temperature, floor=floor
        )
        assert work.abs().max() <= max(1.0, min(floor, 1.0) ** (1.0 - temperature)) * (1 + 1e-12)


def sum_edit(name, change):
    return lambda case: case.tensors.update({name: change(case.tensors[name])})


@reject_params(
    [
        (
            "tokens",
            lambda c: c.tensors.update(
                {k: t.transpose(0, 1).contiguous() for k, t in c.tensors.items()}
            ),
            "logits",
        ),
        (
            "strides",
            sum_edit("logits", lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)),
            "logits",
        ),
        ("integers", sum_edit("logits", lambda t: t.int()), "logits"),
        ("label", sum_edit("labels", lambda t: t + 7), "labels"),
        ("labels-dtype", sum_edit("labels", lambda t: t.int()), "labels"),
        ("labels-meta", sum_edit("labels", lambda t: t.to("meta")), "labels"),
        *bad_numbers(temperature=(-0.1,), floor=(0.0,), scale=(math.inf, -math.inf)),
    ]
)
def test_sum_rejects(edit, argument):
    assert_all_entries_reject("adaptive_cross_entropy_sum_", sum_case, edit, argument)


def backward_case(shape=(4, 3, 10), dtype=torch.float32, device="cpu"):
    _, _, labels = last_layer(shape, dtype, device)
    logits = values(shape, dtype, device)
    outputs = reference.adaptive_cross_entropy(logits, labels, 0.5, 1e-6, -100)
    tensors = {
        "grad": torch.tensor(-0.7, device=device),
        "logits": logits,
        "labels": labels,
        "weights": outputs[2],
    }
    return Case({**tensors, "log_sums": outputs[4]}, {"ignore_index": -100})


@reject_params(
    [
        ("grad", sum_edit("grad", lambda t: t.expand(2)), "grad"),
        (
            "strides",
            sum_edit("logits", lambda t: t.transpose(0, 2).contiguous().transpose(0, 2)),
            "logits",
        ),
        ("labels", sum_edit("labels", lambda t: t[:, 1:]), "labels"),
        ("weights", sum_edit("weights", lambda t: t[1:]), "weights"),
        ("log_sums", sum_edit("log_sums", lambda t: t[:, 1:]), "log_sums"),
    ]
)
def test_backward_rejects(edit, argument):
    assert_all_entries_reject("adaptive_cross_entropy_backward_", backward_case, edit, argument)


def scale_case(shape=(4, 10), dtype=torch.float32, device="cpu"):
    return Case(
        {"gradient": values(shape, dtype, device), "factor": torch.tensor(-0.7, device=device)}, {}
    )


@reject_params(
    [
        ("factor", sum_edit("factor", lambda t: t.expand(2)), "factor"),
        ("integers", sum_edit("gradient", lambda t: t.int()), "gradient"),
        ("strides", sum_edit("gradient", lambda t: t[:, ::2]), "gradient"),
    ]
)
def test_scale_rejects(edit, argument):
    assert_all_entries_reject("adaptive_cross_entropy_scale_", scale_case, edit, argument)


MADE = {"sum_": sum_case, "backward_": backward_case, "scale_": scale_case}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_opcheck(device, dtype, name):
    assert_opcheck(f"adaptive_cross_entropy_{name}", MADE[name](dtype=dtype, device=device))


@pytest.mark.parametrize("name", MADE)
def test_strides_are_refused(name):
    assert_noncontiguous_is_right_or_refused(f"adaptive_cross_entropy_{name}", MADE[name]())


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_deterministic(device, dtype, set_threads):
    threads = set_threads if device == "cpu" else None
    assert_deterministic(
        sum_case((200, 1, 501), dtype, device), ops.adaptive_cross_entropy_sum_, threads
    )
    assert_deterministic(
        backward_case((9, 7, 501), dtype, device), ops.adaptive_cross_entropy_backward_, threads
    )
