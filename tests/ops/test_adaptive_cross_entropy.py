import math

import pytest
import tolerances
import torch
import torch.nn.functional as F
from cases import DTYPES, NATIVE_DTYPES, lazy_zeros, values
from row_ops import ADAPTIVE_CROSS_ENTROPY as OP
from row_ops import cross_entropy_case as make

from sfron_fast import losses
from sfron_fast.ops import reference
from sfron_fast.ops import registry as ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_with_infinite_logits(device, dtype):
    """-inf forbids a class; inf or NaN shows in the loss and is not weighted away."""
    case = make((4, 3, 70), dtype, device, ignored=0.0)
    case.tensors["labels"].clamp_(max=9)
    case.tensors["logits"][..., 10:] = -math.inf
    OP.assert_right(case, grad=1.0)
    for poison in (math.inf, math.nan):
        for at in (0, 40, 69):
            poisoned = case.clone()
            poisoned.tensors["logits"][1, 2, at] = poison
            poisoned.tensors["labels"][1, 2] = 5
            got = OP.run(poisoned)
            assert not math.isfinite(got["loss"])
            assert not torch.isfinite(got["losses"][1])
            assert torch.isfinite(got["losses"][[0, 2, 3]]).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(device, dtype):
    """Rows (0, 0) and (0, ln 3): losses ln 2 and ln 4 - ln 3 = ln(4/3) for labels 0 and 1.

    Temperature 1: w_i = 1 / l_i / sum, so sum w_i l_i = 2 / (1 / ln 2 + 1 / ln(4/3)), and the
    gradient of the first row is w_1 (1/2 - 1, 1/2), of the second w_2 (1/4, 3/4 - 1).
    """
    first, second = math.log(2), math.log(4 / 3)
    logits = torch.tensor(
        [[0.0, 0.0], [0.0, math.log(3)]], dtype=dtype, device=device, requires_grad=True
    )
    loss = losses.adaptive_cross_entropy(logits, torch.tensor([0, 1], device=device), 1.0)
    loss.backward()
    total = 1 / first + 1 / second
    close = {"rel": 4 * tolerances.EPS[dtype]}  # ln 3 is rounded to the dtype
    assert loss.item() == pytest.approx(2 / total, **close)
    weights = [1 / first / total, 1 / second / total]
    expected = [-weights[0] / 2, weights[0] / 2, weights[1] / 4, -weights[1] / 4]
    assert logits.grad.flatten().tolist() == pytest.approx(expected, **close)


# Relative errors of 64 losses and of their gradient (2-norms), 10 classes, on a CPU: ours, then
# F.cross_entropy's
#   losses of  1e-6                  1e-4                  1e-2                  1
#   float32    2e-7 3e-7|6e-2 5e-2   2e-7 2e-7|7e-4 6e-4   1e-7 1e-7|6e-6 5e-6   4e-8 4e-8|5e-8 4e-8
#   bfloat16   6e-8 2e-3|1e+0 8e-1   5e-8 1e-3|1e+0 8e-1   5e-8 2e-3|2e-1 2e-1   4e-8 2e-3|2e-3 3e-3
#   float16    6e-8 4e-2|1e+0 8e-1   4e-8 5e-4|1e+0 9e-1   6e-8 2e-4|3e-2 2e-2   4e-8 2e-4|3e-4 3e-4
# (of the gradient the store's rounding is left, of float16's at 1e-6 its subnormals)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_remembered_samples(device, dtype, offset):
    """Value and gradient keep their digits from losses of 1e-9 to 100, in every form, at the label
    and beside it.

    The truth: with z = log-sum-exp of the others - the label's logit, the loss is log(1 + e^z), and
    1 - softmax of the label is sigmoid(z); no small difference is formed.
    """
    classes, wanted_losses = 33, torch.logspace(-9, 2, 12, dtype=torch.float64)
    x, y = values((12, classes), torch.float64, "cpu"), torch.randint(classes, (12, 1))
    others = x.scatter(1, y, -math.inf).logsumexp(1, keepdim=True)
    x = (x.scatter(1, y, others - wanted_losses.expm1().log().unsqueeze(1)) + offset).to(dtype)
    wide = x.double()
    z = wide.scatter(1, y, -math.inf).logsumexp(1, keepdim=True) - wide.gather(1, y)
    truth = F.softplus(z, threshold=1e3).squeeze(1)
    gradient = (wide - wide.gather(1, y) - truth.unsqueeze(1)).exp().scatter(1, y, -z.sigmoid())
    x, y = x.to(device), y.squeeze(1).to(device)
    parts, over = losses.adaptive_cross_entropy_parts, {"inplace": True}
    forms = {
        "plain": lambda leaf: parts(leaf, y, 0.0)[:2],
        "in place": lambda leaf: parts(leaf * 1, y, 0.0, **over)[:2],
        "sum": lambda leaf: (
            losses.adaptive_cross_entropy_sum_(leaf * 1, y, 0.0, scale=1 / 12)[0],
            None,
        ),
    }
    found = {}
    for name, form in forms.items():
        leaf = x.clone().requires_grad_()
        loss, per_sample = form(leaf)
        loss.backward()
        found[name] = per_sample, leaf.grad * 12
    outputs = reference.adaptive_cross_entropy(x.unsqueeze(1), y.unsqueeze(1), 0.0, 1.0, -100)
    arguments = torch.ones(()), x.unsqueeze(1), y.unsqueeze(1), outputs[2] * 12, outputs[4], -100
    found["reference"] = (
        outputs[1],
        reference.adaptive_cross_entropy_backward(*arguments).squeeze(1),
    )
    bound = max(64 * tolerances.U, tolerances.EPS[dtype]) if dtype != torch.float64 else 1e-12
    for name, (per_sample, grad) in found.items():
        if per_sample is not None:
            relative = (per_sample.cpu().double() / truth - 1).abs()
            assert relative.max() < min(bound, 64 * tolerances.U), (name, relative)
        off = (grad.cpu().double() - gradient).abs()
        assert (off <= bound * gradient.abs() + 12 * tolerances.TINY[dtype]).all(), (
            name,
            off / gradient.abs(),
        )


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_infinite_logits_of_long_rows(device, dtype):
    """log_sums: inf wherever an inf is and however large the others are, unless there is a NaN,
    before or behind it.
    """
    rows = torch.randn(7, 1, 5000).to(dtype)
    rows[0, 0, 100] = rows[1, 0, 4900] = rows[2, 0, 2500] = rows[3, 0, 100] = rows[4, 0, 4900] = (
        math.inf
    )
    rows[2, 0, 40], rows[3, 0, 4000], rows[4, 0, 7], rows[5, 0, 4999] = (
        3e4,
        math.nan,
        math.nan,
        math.nan,
    )
    labels = torch.zeros(7, 1, dtype=torch.int64, device=device)
    lse = (
        ops.op("adaptive_cross_entropy")(rows.to(device), labels, 0.5, 1e-6, -100)[4]
        .sum(dim=0)
        .cpu()
    )
    wanted = torch.logsumexp(rows.double(), 2)
    assert torch.allclose(lse.double(), wanted, rtol=1e-5, atol=0.0, equal_nan=True)
    assert lse.isnan().sum() == 3
    assert lse.isinf().sum() == 3


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_out_is_untouched(device, dtype, poison):
    """A token without a label has no part in anything, whatever its logits, and its gradient is 0,
    not 0 times inf.
    """
    case = make((6, 5, 33), dtype, device, ignored=0.4)
    case.tensors["labels"][2] = -100
    clean = OP.run(case)
    ignored = case.tensors["labels"] == -100
    case.tensors["logits"][ignored] = poison
    got = OP.run(case)
    for name in ("loss", "losses", "weights", "log_normaliser", "gradient"):
        assert torch.equal(got[name], clean[name]), name
    assert (got["gradient"][ignored] == 0).all()
    assert got["weights"][2] == got["losses"][2] == 0


@pytest.mark.parametrize("grad", [1.0, -2.5])
def test_gradcheck(device, grad):
    """The analytic backward against finite differences with the weights held fixed, and against
    autograd in fp64.
    """
    case = make((3, 4, 5), torch.float64, device)
    logits, labels = case.tensors.values()
    _, _, weights, _, log_sums = case.run(reference.adaptive_cross_entropy)

    class FixedWeights(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (weights * reference.adaptive_cross_entropy(x, labels, 0.5, 1e-6, -100)[1]).sum()

        @staticmethod
        def backward(ctx, upstream):
            (x,) = ctx.saved_tensors
            return reference.adaptive_cross_entropy_backward(
                upstream,
                x,
                labels,
                weights,
                reference.cross_entropy_log_sums(x, labels.clamp_min(0)),
                -100,
            )

    torch.autograd.gradcheck(
        lambda x: FixedWeights.apply(x) * grad, logits.clone().requires_grad_()
    )
    upstream = torch.tensor(grad, dtype=torch.float64, device=device)
    analytic = reference.adaptive_cross_entropy_backward(
        upstream, logits, labels, weights, log_sums, -100
    )
    # both in fp64: the fp32 bound, scaled from 2^-24 to 2^-53, is generous by a constant only
    truth, bound = tolerances.cross_entropy(logits, labels, 0.5, 1e-6, grad=grad)["gradient"]
    assert ((OP.run(case, grad)["gradient"] - analytic).abs() <= bound * 2.0**-28).all()
    assert ((truth - analytic).abs() <= bound * 2.0**-28).all()


def test_parts_of_a_batch_add_up(device):
    """Loss times normaliser of two halves, over the sum of the normalisers, is the loss of the
    whole.
    """
    case = make((8, 3, 10), device=device)
    logits, labels = case.tensors.values()
    whole, parts = losses.adaptive_cross_entropy_parts(logits, labels), []
    for half in (slice(0, 4), slice(4, 8)):
        parts.append(losses.adaptive_cross_entropy_parts(logits[half], labels[half]))
    together = sum(p[0] * p[3] for p in parts) / sum(p[3] for p in parts)
    assert torch.allclose(together, whole[0], rtol=64 * tolerances.U, atol=0.0)


@pytest.mark.long
def test_index_arithmetic_above_2_31():
    if ops.kernel_for("adaptive_cross_entropy", "cpu") != "native":
        pytest.skip("the reference would widen 2^31 elements to fp32")
    classes = 2**16
    rows = 2**15 + 2
    logits = lazy_zeros(rows * classes, torch.bfloat16).view(rows, 1, classes)
    labels = torch.zeros((rows, 1), dtype=torch.int64)
    logits[-1, 0, -1], labels[-1] = 20.0, classes - 1
    _, per_sample, _, _, (shift, log_sum) = ops.op("adaptive_cross_entropy")(
        logits, labels, 0.5, 1e-6, -100
    )
    assert shift[-1].item() == 20.0
    assert log_sum[-1].item() == pytest.approx(
        math.log1p((classes - 1) * math.exp(-20.0)), rel=1e-6
    )
    assert per_sample[-1].item() < 2e-4
    assert per_sample[:-1].tolist() == pytest.approx([math.log(classes)] * (rows - 1), rel=1e-6)
