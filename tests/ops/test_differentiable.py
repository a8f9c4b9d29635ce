"""The losses under everything torch can do to a function: second derivatives, forward mode,
torch.func, a compiler.

The truth is autograd of torch's own losses in fp64, with the weights as constants.
"""

import pytest
import tolerances as tol
import torch
import torch.nn.functional as F
from cases import DTYPES
from torch.autograd import forward_ad

import sfron_fast as sf

SAMPLES, CLASSES = 5, 4
_generator = torch.Generator().manual_seed(0)
X, OTHER, DIRECTION = (
    torch.randn(SAMPLES, CLASSES, generator=_generator, dtype=torch.float64) for _ in range(3)
)
LABELS = torch.tensor([0, 3, -100, 1, 2])  # one sample without a label
ROWS = torch.tensor([1.0, -2.0, 0.0, 0.5, 1.5])
BIAS, WEIGHTS = torch.tensor([[0.5, -torch.inf, 1.0, -1.0], [1.0, 2.0, 0.0, 0.5]])  # of the classes

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weighed(losses, counted=True):
    """sum w_i l_i with w_i = l_i^-1/2 / sum, constants."""
    raw = torch.where(torch.as_tensor(counted), losses.detach().pow(-0.5), 0.0)
    return (raw / raw.sum() * losses).sum()


def cross_entropy(x):
    return weighed(F.cross_entropy(x, LABELS, reduction="none"), LABELS >= 0)


def cross_entropy_sum(x):
    losses = F.cross_entropy(x, LABELS, reduction="none")
    return (torch.where(LABELS >= 0, losses.detach().pow(-0.5), 0.0) * losses).sum()


def squared_error(x):
    return weighed((x - other(x)).square().mean(1))


def soft_targets(x):
    pair = ((t / 2).log_softmax(1) for t in (x, other(x)))
    return (ROWS * F.kl_div(*pair, log_target=True, reduction="none").sum(1) * 4).sum()


def soft_targets_of_classes(x):
    log_q, log_p = (x / 2).log_softmax(1), (other(x) / 2 + BIAS).log_softmax(1)
    p = log_p.exp()
    terms = WEIGHTS * p * (log_p.where(p > 0, 0) - log_q)
    return (ROWS * terms.sum(1) * 4).sum()


def other(x):
    """The constant as the dtype has it, in the dtype."""
    return OTHER.to(OURS_DTYPE[0]).to(x.dtype)


OURS_DTYPE = [torch.float64]
LOSSES = {
    "cross_entropy": (lambda x: sf.adaptive_cross_entropy(x, LABELS), cross_entropy),
    "squared_error": (lambda x: sf.adaptive_mse(x, other(x)), squared_error),
    "soft_targets": (lambda x: sf.soft_target_kl(x, other(x), ROWS, 2.0), soft_targets),
    "soft_targets_of_classes": (
        lambda x: sf.soft_target_kl(x, other(x), ROWS, 2.0, class_bias=BIAS, class_weights=WEIGHTS),
        soft_targets_of_classes,
    ),
}
OVER = {
    "inplace": (lambda x: sf.adaptive_cross_entropy(x * 1, LABELS, inplace=True), cross_entropy),
    "sum_": (lambda x: sf.adaptive_cross_entropy_sum_(x * 1, LABELS)[0], cross_entropy_sum),
}


@pytest.fixture
def points(dtype):
    """(x in the dtype, the same in fp64)"""
    OURS_DTYPE[0] = dtype
    yield X.to(dtype), X.to(dtype).double()
    OURS_DTYPE[0] = torch.float64


def near(found, wanted, dtype):
    """The formulas have a few dozen roundings in fp32, and some in the dtype: gradients that
    autograd hands on.
    """
    bound = 8 * tol.EPS[dtype] if dtype in (torch.bfloat16, torch.float16) else 64 * tol.EPS[dtype]
    assert found.dtype in (dtype, torch.float32, torch.float64)
    error = (found.detach().double() - wanted).abs().max()
    assert error <= bound * max(1.0, wanted.abs().max()), (error, wanted.abs().max())
    assert wanted.abs().max() > 1e-3


@each_dtype
@pytest.mark.parametrize("name", LOSSES)
def test_second_and_third_derivatives(dtype, name, points):
    ours, truth = LOSSES[name]
    found = []
    for f, point in zip((ours, truth), points, strict=True):
        leaf, direction = point.clone().requires_grad_(), DIRECTION.to(point.dtype)
        factor = torch.tensor(-1.5, requires_grad=True)
        (first,) = torch.autograd.grad(f(leaf) * factor, leaf, create_graph=True)
        by_leaf, by_factor = torch.autograd.grad(
            (first * direction).sum(), (leaf, factor), create_graph=True
        )
        (third,) = torch.autograd.grad((by_leaf * direction).sum() + 0 * leaf.sum(), leaf)
        found.append((first, by_leaf, by_factor, third))
    for i, (got, wanted) in enumerate(zip(*found, strict=True)):
        if name == "squared_error" and i == 3:
            assert not got.any()  # a square has none
        else:
            near(got, wanted.detach().double(), dtype)


@each_dtype
@pytest.mark.parametrize("name", [*LOSSES, *OVER])
def test_forward_mode_and_torch_func(dtype, name, points):
    """Inside a transform nothing is written over the logits."""
    ours, truth = (LOSSES | OVER)[name]
    x, exact = points
    direction = DIRECTION.to(dtype)
    leaf = exact.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(truth(leaf), leaf)
    slope = (gradient * direction.double()).sum()
    near(torch.func.grad(ours)(x), gradient, dtype)
    near(torch.func.jvp(ours, (x,), (direction,))[1], slope, dtype)
    near(torch.func.jacfwd(ours)(x), gradient, dtype)
    with forward_ad.dual_level():
        dual = ours(forward_ad.make_dual(x.clone().requires_grad_(), direction))
        near(forward_ad.unpack_dual(dual).tangent, slope, dtype)
    batch = torch.stack([x, x * 0.5])
    near(torch.func.vmap(ours)(batch), torch.stack([truth(t.double()) for t in batch]), dtype)
    near(torch.func.vmap(torch.func.grad(ours))(batch)[0], gradient, dtype)
    hessian = torch.autograd.functional.hessian(truth, exact)
    near(torch.func.hessian(ours)(x), hessian, dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled_transforms(name):
    torch._dynamo.reset()
    ours, _ = LOSSES[name]
    x, direction = X.float(), DIRECTION.float()
    for f in (lambda t: torch.func.jvp(ours, (t,), (direction,))[1], torch.func.grad(ours)):
        found = torch.compile(lambda t: f(t), backend="aot_eager", fullgraph=True)(x)  # noqa: B023
        torch.testing.assert_close(found, f(x), rtol=1e-5, atol=1e-6)


NUMBERS = {
    "cross_entropy": lambda x, a, b: sf.adaptive_cross_entropy(x, LABELS, a, floor=b),
    "inplace": lambda x, a, b: sf.adaptive_cross_entropy(x * 1, LABELS, a, floor=b, inplace=True),
    "sum_": lambda x, a, b: sf.adaptive_cross_entropy_sum_(x * 1, LABELS, a, floor=b, scale=-a)[0],
    "squared_error": lambda x, a, b: sf.adaptive_mse(x, 2 * x.detach(), a, floor=b),
    "soft_targets": lambda x, a, b: sf.soft_target_kl(x, 2 * x.detach(), None, a + b),
    "weights": lambda x, a, b: (sf.adaptive_weights(x[:, 0].abs(), a, b) * x[:, 0]).sum(),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in NUMBERS), ("cross_entropy", torch.float64)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_compiled_with_numbers_that_change(name, dtype):
    """Symbolic where another value was seen before, and with ``dynamic=True``; torch compiles an op
    for each value.
    """
    f = NUMBERS[name]
    for options, values in (
        ({}, ((0.5, 1e-6), (0.7, 1e-2), (2.0, 0.1))),
        ({"dynamic": True}, ((1.25, 0.3),)),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True, **options)
        for numbers in values:
            found = []
            for call in (compiled, f):
                leaf = X.to(dtype).requires_grad_()
                loss = call(leaf, *numbers)
                found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
            for got, wanted in zip(*found, strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-7)
    torch._dynamo.reset()


def test_an_ignored_label_may_be_symbolic():
    torch._dynamo.reset()
    f = torch.compile(
        lambda x, i: sf.adaptive_cross_entropy(x, LABELS.clamp_min(0), ignore_index=i),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for ignored in (3, 1, -100):
        expected = sf.adaptive_cross_entropy(X, LABELS.clamp_min(0), ignore_index=ignored)
        torch.testing.assert_close(f(X, ignored), expected)
    torch._dynamo.reset()
