import math

import pytest
import tolerances
import torch
from cases import (
    DTYPES,
    NATIVE_DTYPES,
    Case,
    assert_all_entries_reject,
    assert_deterministic,
    assert_opcheck,
    assert_within,
    bad_numbers,
    channels_last,
    compiled_equals_eager,
    lazy_zeros,
    reject_params,
    shifted,
    strided,
    transposed,
    values,
)

from sfron_fast import losses
from sfron_fast.ops import adaptive_mse as op_file
from sfron_fast.ops import reference, rows
from sfron_fast.ops import registry as ops

OUTPUTS = ("loss", "losses", "weights", "log_normaliser")


def make(
    shape=(4, 70),
    dtype=torch.float32,
    device="cpu",
    *,
    scale=1.0,
    temperature=0.5,
    floor=1e-6,
    mean=True,
) -> Case:
    tensors = {name: values(shape, dtype, device, scale=scale) for name in ("prediction", "target")}
    return Case(tensors, {"temperature": temperature, "floor": floor, "mean": mean})


def run(case: Case, grad: float = 1.0) -> dict[str, torch.Tensor]:
    prediction = case.tensors["prediction"].detach().requires_grad_()
    kernel = rows.kernel("adaptive_mse", op_file.differentiable, prediction)
    outputs = dict(
        zip(
            OUTPUTS, kernel(prediction, case.tensors["target"], *case.scalars.values()), strict=True
        )
    )
    (gradient,) = torch.autograd.grad(outputs["loss"] * grad, prediction)
    return {name: t.detach() for name, t in outputs.items()} | {"gradient": gradient}


def assert_close_to_truth(case: Case, grad: float = 1.0) -> None:
    bounds = tolerances.mean_squared_error(*case.tensors.values(), *case.scalars.values(), grad)
    assert_within(run(case, grad), bounds)
    with torch.no_grad():  # the reference is held to the same bounds
        prediction, target = case.tensors.values()
        outputs = dict(zip(OUTPUTS, case.run(reference.adaptive_mse), strict=True))
        outputs["gradient"] = reference.adaptive_mse_backward(
            torch.tensor(grad, device=prediction.device),
            prediction,
            target,
            outputs["weights"],
            case.scalars["mean"],
        )
        assert_within(outputs, bounds)


CASES = {
    "mean": {},
    "sum": {"mean": False},
    "one element": {"shape": (5, 1)},
    "one sample": {"shape": (1, 33)},
    "images": {"shape": (16, 3 * 32 * 32)},
    "large": {"scale": 100.0},
    "small": {"scale": 1e-3},
    "below the floor": {"scale": 1e-2, "floor": 1.0},
    "around the floor": {"shape": (32, 5), "floor": 2.0},
    "plain average": {"temperature": 0.0},
    "steep": {"temperature": 2.0, "shape": (16, 20)},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(device, dtype, name):
    assert_close_to_truth(make(**CASES[name], dtype=dtype, device=device), grad=-0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_with_infinite_predictions(device, dtype):
    """inf or NaN shows in the loss and is not weighted away."""
    for poison in (math.inf, -math.inf, math.nan):
        for at in (0, 40, 69):
            case = make(dtype=dtype, device=device)
            case.tensors["prediction"][1, at] = poison
            got = run(case)
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
    got = run(case)
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
    prediction, target = case.tensors.values()
    weights = case.run(reference.adaptive_mse)[2]

    class FixedWeights(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (weights * reference.adaptive_mse(x, target, 0.5, 1e-6, mean)[1]).sum()

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
    assert ((run(case, grad)["gradient"] - analytic).abs() <= bound * 2.0**-28).all()
    assert ((truth - analytic).abs() <= bound * 2.0**-28).all()


@pytest.mark.checklist("E2")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_opcheck(device, dtype):
    for shape in ((4, 70), (0, 5), (3, 0)):
        case = make(shape, dtype, device)
        assert_opcheck("adaptive_mse", case)
        case.tensors["prediction"].requires_grad_()
        assert_opcheck("adaptive_mse", case)
        prediction, target = case.tensors["prediction"].detach(), case.tensors["target"]
        weights = ops.adaptive_mse(prediction, target, 0.5, 1e-6, True)[2]
        tensors = {
            "grad": torch.ones((), device=device),
            "prediction": prediction,
            "target": target,
        }
        assert_opcheck(
            "adaptive_mse_backward", Case({**tensors, "weights": weights}, {"mean": True})
        )


def test_compile(device):
    cases = [make((8, 12), device=device) for _ in range(3)]
    assert compiled_equals_eager(ops.adaptive_mse, cases) == 1
    compiled = torch.compile(losses.adaptive_mse, fullgraph=True, backend="aot_eager")
    eager, other = (cases[0].tensors["prediction"].clone().requires_grad_() for _ in range(2))
    target = cases[0].tensors["target"]
    (losses.adaptive_mse(eager, target) * -2.0).backward()
    (compiled(other, target) * -2.0).backward()
    assert torch.equal(eager.grad, other.grad)


@pytest.mark.checklist("B7")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(device, dtype, set_threads):
    case = make((33, 40_001), dtype, device)

    def outputs_and_gradient(**arguments):
        return list(
            run(Case({k: arguments[k] for k in ("prediction", "target")}, case.scalars)).values()
        )

    native = dtype != torch.float64 and ops.kernel_for("adaptive_mse", device) == "native"
    assert_deterministic(case, outputs_and_gradient, set_threads if native else None)


ELEMENTS = (1, 2, 63, 64, 65, 511, 512, 513, 16383, 16384, 16385)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [None, shifted, strided, transposed])
def test_empty_odd_and_large(device, dtype, layout):
    for elements in ELEMENTS:
        case = make((3, elements), dtype, device)
        if layout is None:
            assert_close_to_truth(case)
            continue
        prediction, target = case.tensors.values()
        leaf = layout(prediction.detach()).requires_grad_()
        loss = losses.adaptive_mse(leaf, layout(target))
        loss.backward()
        expected = run(case)
        assert torch.equal(loss, expected["loss"])
        assert torch.equal(leaf.grad, expected["gradient"])
    for shape in ((1, 200_001), (70_001, 3), (0, 3), (3, 0)):
        assert_close_to_truth(make(shape, dtype, device))
    assert run(make((0, 3), dtype, device))["loss"] == 0
    with pytest.raises(ValueError, match="at least one sample"):
        losses.adaptive_mse(torch.zeros(0, 3, device=device), torch.zeros(0, 3, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_images_in_any_memory_format(device, dtype):
    prediction, target = (values((2, 3, 5, 7), dtype, device) for _ in range(2))
    expected = run(
        Case(
            {"prediction": prediction.flatten(1), "target": target.flatten(1)},
            {"temperature": 0.5, "floor": 1e-6, "mean": True},
        )
    )
    leaf = channels_last(prediction).requires_grad_()
    loss = losses.adaptive_mse(leaf, target)
    loss.backward()
    assert torch.equal(loss, expected["loss"])
    assert torch.equal(leaf.grad.flatten(1), expected["gradient"])


def put(name, change):
    def edit(case):
        case.tensors[name] = change(case.tensors[name])

    return edit


BAD = [
    ("prediction-1d", put("prediction", lambda t: t[0]), "prediction"),
    ("prediction-3d", put("prediction", lambda t: t.unsqueeze(2)), "prediction"),
    ("prediction-integers", put("prediction", lambda t: t.to(torch.int32)), "prediction"),
    ("target-shape", put("target", lambda t: t[:, :-1]), "target[0]"),
    ("target-dtype", put("target", lambda t: t.bfloat16()), "target[0]"),
    ("target-meta", put("target", lambda t: t.to("meta")), "target[0]"),
    *bad_numbers(temperature=(-0.1,), floor=(0.0, -1.0)),
]


@reject_params(BAD)
def test_rejects(edit, argument):
    assert_all_entries_reject("adaptive_mse", make, edit, argument.removesuffix("[0]"))


def test_version_counter():
    """Nothing is written; a prediction changed between forward and backward is noticed."""
    prediction = make().tensors["prediction"].requires_grad_()
    work = prediction * 1.0
    loss = losses.adaptive_mse(work, torch.zeros_like(work))
    assert work._version == 0
    work.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
    _, per_sample, _, _ = ops.adaptive_mse(prediction, target, 0.5, 1e-6, False)
    assert per_sample.tolist() == [4.0, 25.0]
