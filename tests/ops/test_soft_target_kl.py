import math

import pytest
import tolerances
import torch
import torch.nn.functional as F
from cases import DTYPES, NATIVE_DTYPES, lazy_zeros
from row_ops import SOFT_TARGET_KL as OP
from row_ops import kl_case as make

from sfron_fast import losses
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_matches_torch(device, temperature):
    """F.kl_div over log-softmaxes, which knows nothing of ours; in fp64."""
    case = make((9, 40), torch.float64, device, temperature=temperature)
    logits, teacher, weights, *_ = case.tensors.values()
    logits.requires_grad_()
    pair = ((x / temperature).log_softmax(1) for x in (logits, teacher))
    rows = F.kl_div(*pair, log_target=True, reduction="none").sum(1) * temperature**2
    for ours, theirs in (
        (losses.soft_target_kl(logits, teacher, weights, temperature), (weights * rows).sum()),
        (losses.soft_target_kl(logits, teacher, temperature=temperature), rows.mean()),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
        gradients = [
            torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_the_teacher_itself_has_loss_and_gradient_zero(device, dtype):
    for shape in ((4, 10), (3, 5000)):
        case = make(shape, dtype, device, near=0.0, temperature=3.0)
        got = OP.run(case)
        assert not got["losses"].any()
        assert not got["gradient"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_with_infinite_logits(device, dtype):
    """A class that the teacher forbids adds nothing; forbidden by the logits alone it is inf; inf
    and NaN show.
    """
    case = make((4, 5000), dtype, device)
    case.tensors["weights"] += 2.0
    case.tensors["teacher_logits"][:, 10:4000] = -math.inf
    OP.assert_right(case, grad=1.0)
    case.tensors["logits"][:, 20:3000] = -math.inf
    OP.assert_right(case, grad=1.0)
    forbidden = case.clone()
    forbidden.tensors["logits"][2, 5] = -math.inf
    assert OP.run(forbidden)["losses"].isinf().tolist() == [False, False, True, False]
    for name in ("logits", "teacher_logits"):
        for poison in (math.inf, math.nan):
            for at in (0, 2100, 4999):
                poisoned = case.clone()
                poisoned.tensors[name][1, at] = poison
                got = OP.run(poisoned)
                assert not math.isfinite(got["loss"])
                assert torch.isfinite(got["losses"]).tolist() == [True, False, True, True]
                assert not torch.isfinite(got["gradient"][1]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """T = 2, teacher (0, 0): p = (1/2, 1/2); logits (0, 2 ln 3): q = (1/4, 3/4).

    KL = 1/2 ln 2 + 1/2 ln(2/3) = 1/2 ln(4/3), times T^2 = 4; gradient T (q - p) = (-1/2, 1/2).
    Weight -3 for all of it.
    """
    logits = torch.tensor([[0.0, 2 * math.log(3)]], dtype=dtype, device=device, requires_grad=True)
    loss = losses.soft_target_kl(
        logits, torch.zeros_like(logits), torch.tensor([-3.0], device=device), 2.0
    )
    loss.backward()
    close = {"rel": 4 * tolerances.EPS[dtype]}  # ln 3 is rounded to the dtype
    assert loss.item() == pytest.approx(-6 * math.log(4 / 3), **close)
    assert logits.grad.flatten().tolist() == pytest.approx([1.5, -1.5], **close)


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_is_untouched(device, dtype, poison):
    """A row of weight 0 has no part in anything, whatever its logits, and its gradient is 0, not 0
    times inf.
    """
    case = make((6, 33), dtype, device)
    clean = OP.run(case)
    for name in ("logits", "teacher_logits"):
        case.tensors[name][1] = poison
        before, got = case.clone(), OP.run(case)
        for (_, now), (_, then) in zip(case.flat(), before.flat(), strict=True):
            assert torch.equal(now.nan_to_num(nan=7.0), then.nan_to_num(nan=7.0))
        for output in ("loss", "losses", "gradient"):
            assert torch.equal(got[output], clean[output]), output
        assert got["losses"][1] == 0
        assert not got["gradient"][1].any()
        assert (got["gradient"][[0, 2, 3, 4, 5]] != 0).any(dim=1).all()


@pytest.mark.parametrize("grad", [1.0, -2.5])
def test_gradcheck(device, grad):
    """Of fp64 by finite differences, and the analytic backward against it."""
    case = make((4, 5), torch.float64, device, temperature=3.0)
    logits, teacher, weights, *_ = case.tensors.values()
    leaf = logits.clone().requires_grad_()
    torch.autograd.gradcheck(lambda x: losses.soft_target_kl(x, teacher, weights, 3.0) * grad, leaf)
    upstream = torch.tensor(grad, dtype=torch.float64, device=device)
    log_sums = case.run(reference.soft_target_kl)[2]
    analytic = reference.soft_target_kl_backward(
        upstream, logits, teacher, weights, None, None, log_sums, 3.0
    )
    # both in fp64: the fp32 bound, scaled from 2^-24 to 2^-53, is generous by a constant only
    truth, bound = tolerances.soft_target_kl(*case.tensors.values(), 3.0, grad)["gradient"]
    assert ((OP.run(case, grad)["gradient"] - analytic).abs() <= bound * 2.0**-28).all()
    assert ((truth - analytic).abs() <= bound * 2.0**-28).all()


def test_weights_are_constants():
    """No gradient flows into weights that have one; any floating dtype of theirs serves."""
    logits, teacher = make().tensors["logits"].requires_grad_(), make().tensors["logits"]
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    loss = losses.soft_target_kl(logits, teacher, weights)
    assert torch.equal(loss, losses.soft_target_kl(logits, teacher, weights.detach().float()))
    loss.backward()
    assert weights.grad is None


def test_refuses_a_teacher_that_requires_grad():
    with pytest.raises(ValueError, match=r"teacher_logits: .*torch.no_grad\(\)"):
        losses.soft_target_kl(torch.zeros(2, 2), torch.zeros(2, 2, requires_grad=True))


@pytest.mark.long
def test_index_arithmetic_above_2_31():
    if ops.kernel_for("soft_target_kl", "cpu") != "native":
        pytest.skip("the reference would widen 2^31 elements to fp32")
    classes = 2**16
    rows = 2**15 + 2
    logits, teacher = (
        lazy_zeros(rows * classes, torch.bfloat16).view(rows, classes) for _ in range(2)
    )
    logits[-1, -1] = 20.0
    _, per_sample, log_sums = ops.op("soft_target_kl")(logits, teacher, None, None, None, 1.0)
    student = math.log1p((classes - 1) * math.exp(-20.0))
    assert log_sums[:, -1].tolist() == pytest.approx(
        [20.0, student, 0.0, math.log(classes)], rel=1e-6, abs=1e-7
    )
    assert per_sample[-1].item() == pytest.approx(
        20.0 + student - 20.0 / classes - math.log(classes), rel=1e-6
    )
    assert not per_sample[:-1].any()
