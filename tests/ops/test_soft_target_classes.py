"""``soft_target_kl`` with a bias and a weight for each class, against autograd of the plain formula
in fp64.
"""

import math

import pytest
import tolerances
import torch
from cases import DTYPES, NATIVE_DTYPES
from row_ops import CLASSES as SIZES
from row_ops import SOFT_TARGET_KL as OP
from row_ops import kl_case

import sfron_fast as sf
from sfron_fast.ops import reference

ROWS, CLASSES = 5, 7
ROW_WEIGHTS = torch.tensor([0.5, 0.0, -1.5, 0.25, -0.0])
INF = math.inf
# name -> class_bias, class_weights
SOME = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
MANY = torch.tensor([0.0, 2.5, 0.3, 1.0, 0.0, 1e-3, 40.0])
TILT = torch.tensor([0.5, -1.0, 0.0, 2.0, 3.0, -4.0, 0.1])
FORBID = torch.tensor([-INF, 0.0, 0.0, -INF, 0.0, 0.0, -INF])
GIVEN = {
    "zeros and ones": (None, SOME),
    "any weights": (None, MANY),
    "tilted": (TILT, None),
    "forbidden": (FORBID, None),
    "one class allowed": (torch.tensor([-INF] * 6 + [1.0]), None),
    "both": (TILT + FORBID, MANY),
    # all that the teacher may say has weight 0
    "no mass": (FORBID, (FORBID == -INF).float()),
    "no weights": (None, torch.zeros(CLASSES)),
    "all as without": (torch.zeros(CLASSES), torch.ones(CLASSES)),
}
each = pytest.mark.parametrize("name", GIVEN)
each_temperature = pytest.mark.parametrize("temperature", [1.0, 3.0, 0.5])


def drawn(dtype=torch.float64, teacher_forbids=False):
    """logits, teacher; the student forbids class 2 in a row whose teacher does."""
    generator = torch.Generator().manual_seed(3)
    logits, teacher = (
        (2 * torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    )
    if teacher_forbids:
        teacher[0, :3] = -INF
        teacher[2, 6] = -INF
        logits[0, 2] = -INF
    return logits.requires_grad_(), teacher


def plain(logits, teacher, weights, class_bias, class_weights, temperature):
    """What a careful user writes: rows and classes that do not count are selected away first."""
    rows = weights != 0
    x, y, w = logits.double()[rows], teacher.double()[rows], weights.double()[rows]
    k = torch.ones(CLASSES).double() if class_weights is None else class_weights.double()
    bias = torch.zeros(CLASSES).double() if class_bias is None else class_bias.double()
    log_q, log_p = (x / temperature).log_softmax(1), (y / temperature + bias).log_softmax(1)
    some = (log_p > -INF) & (k > 0)
    terms = (k * log_p.exp()).where(some, 0) * (log_p.where(some, 0) - log_q.where(some, 0))
    return (w * terms.sum(1)).sum() * temperature**2


def gradient_of(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def given(name, dtype=torch.float64):
    bias, k = GIVEN[name]
    wide = reference.accumulate_dtype(dtype)
    return [None if t is None else t.to(wide) for t in (bias, k)]


@each
@each_temperature
@pytest.mark.parametrize("teacher_forbids", [False, True])
def test_matches_autograd_of_the_plain_formula(name, temperature, teacher_forbids):
    logits, teacher = drawn(teacher_forbids=teacher_forbids and name != "one class allowed")
    bias, k = given(name)
    arguments = ROW_WEIGHTS.double(), bias, k, temperature
    wanted = plain(logits, teacher, *arguments)
    loss = sf.soft_target_kl(
        logits, teacher, ROW_WEIGHTS, temperature, class_bias=bias, class_weights=k
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    truth = gradient_of(wanted, logits)
    torch.testing.assert_close(gradient_of(loss, logits), truth, rtol=1e-10, atol=1e-14)
    # the derived gradient, by itself
    log_sums = reference.soft_target_kl(logits.detach(), teacher, *arguments)[2]
    assert log_sums.shape == (4 if k is None else 5, ROWS)
    one = torch.ones((), dtype=torch.float64)
    derived = reference.soft_target_kl_backward(
        one, logits.detach(), teacher, *arguments[:3], log_sums, temperature
    )
    torch.testing.assert_close(derived, truth, rtol=1e-10, atol=1e-14)
    assert not derived[ROW_WEIGHTS == 0].any()


@each
def test_gradcheck(name):
    logits, teacher = drawn()
    bias, k = given(name)

    def loss(x):
        return sf.soft_target_kl(x, teacher, ROW_WEIGHTS, 2.0, class_bias=bias, class_weights=k)

    torch.autograd.gradcheck(loss, logits)
    torch.autograd.gradgradcheck(loss, logits)


@each
@each_temperature
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_layout_within_the_bounds(name, temperature, dtype):
    logits, teacher = drawn(dtype, name != "one class allowed")
    constants = given(name, dtype)
    weights = ROW_WEIGHTS.to(reference.accumulate_dtype(dtype))
    bounds = tolerances.soft_target_kl(
        logits.detach(), teacher, weights, *constants, temperature, 1.0
    )
    strided = [torch.stack([t.detach()] * 2, 2)[..., 1] for t in (logits, teacher)]
    strided += [None if t is None else t.repeat_interleave(2)[::2] for t in constants]
    for x, y, bias, k in ((logits, teacher, *constants), strided):
        leaf = x.detach().requires_grad_()
        loss = sf.soft_target_kl(leaf, y, weights, temperature, class_bias=bias, class_weights=k)
        found = {"loss": loss.detach(), "gradient": gradient_of(loss, leaf)}
        for output, value in found.items():
            truth, bound = bounds[output]
            assert ((value.double() - truth).abs() <= bound).all(), output


@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
@pytest.mark.parametrize("classes", [*SIZES, 10])
def test_every_size(device, classes, dtype):
    """Of rows that are narrow or take several blocks, of the first of which all classes may be
    forbidden.
    """
    for given in ({"biased": True}, {"masked": True}, {"biased": True, "masked": True}):
        case = kl_case((35, classes) if classes < 100 else (3, classes), dtype, device, **given)
        OP.assert_right(case)
        if "biased" in given and classes > 2048:
            case.tensors["class_bias"][:2048] = -INF
            OP.assert_right(case)


@pytest.mark.parametrize("classes", [5, 70, 3000])
@pytest.mark.parametrize("dtype", NATIVE_DTYPES, ids=str)
def test_without_mass_a_row_is_zero(device, classes, dtype):
    """Exactly, also where the student has an infinite logit."""
    case = kl_case((4, classes), dtype, device, masked=True)
    case.tensors["class_weights"][:] = 0.0
    case.tensors["class_weights"][1] = 2.0
    case.tensors["teacher_logits"][:, 1] = -INF
    case.tensors["logits"][0, 2] = -INF
    got = OP.run(case)
    assert not got["losses"].any()
    assert not got["log_sums"][4].any()
    assert not got["gradient"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hand_example(dtype):
    """T = 1, teacher (0, ln 2, ln 5), its third class forbidden: p = (1/3, 2/3, 0); equal logits:
    q = 1/3 each.

    k = (0, 2, 9): the loss is 2 * 2/3 ln 2; the mass is 4/3, the gradient 4/9 - k p.
    """
    logits = torch.zeros(1, 3, dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=dtype)
    loss = sf.soft_target_kl(
        logits,
        teacher,
        class_bias=torch.tensor([0.0, 0.0, -INF]),
        class_weights=torch.tensor([0.0, 2.0, 9.0]),
    )
    loss.backward()
    close = {"rel": 4 * tolerances.EPS[dtype]}  # ln 2 is rounded to the dtype
    assert loss.item() == pytest.approx(4 / 3 * math.log(2), **close)
    assert logits.grad.flatten().tolist() == pytest.approx([4 / 9, 4 / 9 - 4 / 3, 4 / 9], **close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_class_without_weight_may_be_forbidden_to_the_student(dtype):
    """Where the teacher says it, too: 0 times inf is 0, in the gradient as well."""
    logits = torch.tensor([[0.0, -INF, 1.0]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0, 1.0]], dtype=dtype)
    k = torch.tensor([1.0, 0.0, 1.0])
    loss = sf.soft_target_kl(logits, teacher, class_weights=k)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1] == 0
    infinite = sf.soft_target_kl(logits, teacher, class_weights=torch.ones(3))
    assert infinite.item() == INF


def test_constants():
    """No gradient flows into either; any floating dtype serves."""
    logits, teacher = drawn(torch.float32)
    bias, k = (t.double().requires_grad_() for t in (TILT, MANY))
    loss = sf.soft_target_kl(logits, teacher, class_bias=bias, class_weights=k)
    assert torch.equal(
        loss, sf.soft_target_kl(logits, teacher, class_bias=TILT, class_weights=MANY)
    )
    loss.backward()
    assert bias.grad is None
    assert k.grad is None
