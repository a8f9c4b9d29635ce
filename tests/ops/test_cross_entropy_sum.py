"""The ops behind ``adaptive_cross_entropy_sum_`` and ``adaptive_cross_entropy(inplace=True)``."""

import math
from functools import partial

import pytest
import tolerances as tol
import torch
from cases import DTYPES, NATIVE_DTYPES
from judging import assert_same_bits
from over_ops import sum_case

from sfron_fast import adaptive_cross_entropy_sum_
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
def test_sum_hand_example(device, dtype):
    """Rows (0, 0) and (0, ln 3): losses ln 2 and ln(4/3). Temperature 1: r_i = 1 / l_i, so sum r_i
    l_i = 2.

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


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_sum_has_the_values_of_the_forward_pass(device, dtype):
    case = sum_case((40, 1, 1000), dtype, device)
    _, per_sample, weights, log_normaliser, _ = ops.op("adaptive_cross_entropy")(
        *case.tensors.values(), 0.5, 1e-6, -100
    )
    outputs = case.run(ops.op("adaptive_cross_entropy_sum_"))
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
    return (ops.default_kernel(name) if dtype == torch.float64 else ops.op(name))(**arguments)


def test_scale_by_1_touches_nothing(device):
    """A signalling NaN, which even a product with 1 would change."""
    bits = torch.full((70,), 0x7F800001, dtype=torch.int32, device=device)
    ops.op("adaptive_cross_entropy_scale_")(bits.view(torch.float32), torch.ones((), device=device))
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
    # 65 * 1e-6 ** -0.5 = 65000, just within fp16
    adaptive_cross_entropy_sum_(half * 1, labels, 1.5, scale=65.0)
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
