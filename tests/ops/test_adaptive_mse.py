import math

import pytest
import tolerances
import torch
from cases import DTYPES, Case, channels_last, lazy_zeros, values
from row_ops import ADAPTIVE_MSE as OP
from row_ops import mse_case as make

from sfron_fast import losses
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops
from sfron_fast.ops.dtypes import accumulate_dtype as reference_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_with_infinite_predictions(device, dtype):
    """inf or NaN shows in the loss and is not weighted away."""
    for poison in (math.inf, -math.inf, math.nan):
        for at in (0, 40, 69):
            case = make(dtype=dtype, device=device)
            case.tensors["prediction"][1, at] = poison
            got = OP.run(case)
            assert not math.isfinite(got["loss"])
            assert not torch.isfinite(got["losses"][1])
            assert torch.isfinite(got["losses"][[0, 2, 3]]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """Errors (1, 1) and (2, 4) summed: losses 2 and 20; temperature 1: weights 10/11 and 1/11, loss
    2
    * 20/11.

    Gradients w 2 d: 20/11, 20/11 and 4/11, 8/11. As means the losses are 1 and 10, the weights the
    same, the rest half.
    """
    for reduction, factor in (("sum", 1.0), ("mean", 0.5)):
        prediction = torch.tensor(
            [[1.0, 1.0], [2.0, 4.0]], dtype=dtype, device=device, requires_grad=True
        )
        loss = losses.adaptive_mse(
            prediction, torch.zeros_like(prediction), 1.0, reduction=reduction
        )
        loss.backward()
        close = {"rel": 4 * tolerances.EPS[dtype]}
        assert loss.item() == pytest.approx(40 / 11 * factor, **close)
        expected = [20 / 11 * factor, 20 / 11 * factor, 4 / 11 * factor, 8 / 11 * factor]
        assert prediction.grad.flatten().tolist() == pytest.approx(expected, **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_is_untouched(device, dtype):
    """No mask here: the arguments stay, and a sample without error has loss and gradient 0 but not
    all the weight.
    """
    case = make((5, 33), dtype, device)
    case.tensors["prediction"][2] = case.tensors["target"][2]
    before = case.clone()
    got = OP.run(case)
    for (_, now), (_, then) in zip(case.flat(), before.flat(), strict=True):
        assert torch.equal(now, then)
    assert got["losses"][2] == 0
    assert (got["gradient"][2] == 0).all()
    assert (got["gradient"][[0, 1, 3, 4]] != 0).any(dim=1).all()
    assert got["weights"].sum().item() == pytest.approx(1.0, rel=8 * tolerances.U)
    assert 0 < got["weights"][2] < 1


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("grad", [1.0, -2.5])
def test_gradcheck(device, grad, mean):
    """The analytic backward against finite differences with the weights held fixed, and against
    autograd in fp64.
    """
    case = make((3, 5), torch.float64, device, mean=mean)
    prediction, target, _ = case.tensors.values()
    weights = case.run(reference.adaptive_mse)[2]

    class FixedWeights(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (
                weights * reference.adaptive_mse(x, target, None, 0.5, 1e-6, mean, math.inf)[1]
            ).sum()

        @staticmethod
        def backward(ctx, upstream):
            (x,) = ctx.saved_tensors
            return reference.adaptive_mse_backward(upstream, x, target, weights, mean)

    torch.autograd.gradcheck(
        lambda x: FixedWeights.apply(x) * grad, prediction.clone().requires_grad_()
    )
    upstream = torch.tensor(grad, dtype=torch.float64, device=device)
    analytic = reference.adaptive_mse_backward(upstream, prediction, target, weights, mean)
    # both in fp64: the fp32 bound, scaled from 2^-24 to 2^-53, is generous by a constant only
    truth, bound = tolerances.mean_squared_error(
        *case.tensors.values(), *case.scalars.values(), grad
    )["gradient"]
    assert ((OP.run(case, grad)["gradient"] - analytic).abs() <= bound * 2.0**-28).all()
    assert ((truth - analytic).abs() <= bound * 2.0**-28).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_in_any_memory_format(device, dtype):
    prediction, target = (values((2, 3, 5, 7), dtype, device) for _ in range(2))
    expected = OP.run(
        Case(
            {"prediction": prediction.flatten(1), "target": target.flatten(1), "reference": None},
            {"temperature": 0.5, "floor": 1e-6, "mean": True, "cap": math.inf},
        )
    )
    leaf = channels_last(prediction).requires_grad_()
    loss = losses.adaptive_mse(leaf, target)
    loss.backward()
    assert torch.equal(loss, expected["loss"])
    assert torch.equal(leaf.grad.flatten(1), expected["gradient"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example_with_a_reference(device, dtype):
    """Means 1 and 10 at timesteps where 1 / 4 and 10 are usual: relative to that 4 and 1.

    Temperature 1: weights 1/5 and 4/5 of them, over the reference 4/5 and 4/50; so the loss is 4/5
    + 4/5. From a cap of 4 on the first has forgotten enough, and the second weighs what it did.
    """
    reference = torch.tensor([0.25, 10.0], device=device).to(reference_dtype(dtype))
    prediction = torch.tensor(
        [[1.0, 1.0], [2.0, 4.0]], dtype=dtype, device=device, requires_grad=True
    )
    close = {"rel": 4 * tolerances.EPS[dtype]}
    for cap, own in ((None, 4 / 5), (4.5, 4 / 5), (4.0, 0.0)):
        prediction.grad = None
        loss = losses.adaptive_mse(
            prediction, torch.zeros_like(prediction), 1.0, reference=reference, cap=cap
        )
        loss.backward()
        assert loss.item() == pytest.approx(own + 4 / 5, **close)
        expected = [own, own, 4 / 25, 8 / 25]
        assert prediction.grad.flatten().tolist() == pytest.approx(expected, **close)
        each = prediction.detach().to(reference.dtype).square().mean(1)
        weights = losses.adaptive_weights(each, 1.0, reference=reference, cap=cap)
        assert weights.tolist() == pytest.approx([own, 4 / 50], **close)


def test_a_reference_of_ones_changes_no_bit(device):
    case = make((33, 70), device=device)
    plain = OP.run(case)
    case.tensors["reference"] = torch.ones(33, device=device)
    for name, found in OP.run(case).items():
        assert torch.equal(found, plain[name]), name


def test_every_timestep_counts_alike_relative_to_its_loss():
    """Of losses that fall a thousandfold over the timesteps, as a model's own do."""
    usual = torch.logspace(0, -3, 10)
    raw = losses.adaptive_weights(usual)
    assert raw[-1] / raw[0] == pytest.approx(1000**0.5, rel=1e-3)
    relative = losses.adaptive_weights(usual, reference=usual)
    assert (relative * usual).tolist() == pytest.approx([0.1] * 10, rel=1e-5)


def test_refuses_a_target_that_requires_grad():
    with pytest.raises(ValueError, match=r"target: .*pass target.detach\(\)"):
        losses.adaptive_mse(torch.zeros(2, 2), torch.zeros(2, 2, requires_grad=True))


@pytest.mark.long
def test_index_arithmetic_above_2_31():
    if ops.kernel_for("adaptive_mse", "cpu") != "native":
        pytest.skip("the reference would widen 2^31 elements to fp32")
    elements = 2**30 + 40
    prediction, target = (
        lazy_zeros(2 * elements, torch.bfloat16).view(2, elements) for _ in range(2)
    )
    prediction[0, 0], prediction[1, -1], target[1, 2**30] = 2.0, 4.0, 3.0
    _, per_sample, _, _ = ops.op("adaptive_mse")(
        prediction, target, None, 0.5, 1e-6, False, math.inf
    )
    assert per_sample.tolist() == [4.0, 25.0]
