"""Inputs of the row ops, judged against the truth in fp64: for the interpreter and a GPU alike."""

import math
from dataclasses import dataclass

import tolerances as tol
import torch
from torch import Tensor

from sfron_fast.ops import reference

IGNORE = -100
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EXP = 2.0**-126  # what exp flushes to 0

# (samples, tokens, classes): one row and many, below, at and above a tile, more rows than one
# program takes
ROWS = [
    (1, 1, 1),
    (3, 1, 2),
    (300, 1, 10),
    (7, 1, 63),
    (5, 1, 64),
    (2, 3, 65),
    (9, 1, 1000),
    (3, 2, 5000),
]
ROWS += [(2, 1100, 3)]
NUMBERS = [(0.5, 1e-6), (0.0, 1e-6), (1.0, 1.5), (3.7, 1e-3)]  # temperature, floor
# samples, classes
CLASSES = [(1, 1), (3, 2), (300, 10), (7, 63), (5, 64), (2, 65), (9, 1000), (3, 5000)]
# samples, elements
SQUARES = [(1, 1), (3, 63), (300, 10), (2, 64), (5, 65), (2, 5000), (3, 0), (1, 20001)]


@dataclass
class Rows:
    """One call of a row op: its tensors, its numbers, the gradient that comes from above."""

    tensors: tuple
    numbers: tuple
    grad: float = -1.75

    def upstream(self) -> Tensor:
        return torch.full((), self.grad, dtype=torch.float32, device=self.tensors[0].device)


def cross_entropy(
    shape, dtype, device="cpu", *, temperature=0.5, floor=1e-6, scale=3.0, ignore=IGNORE
) -> Rows:
    """Random logits and labels; of three or more samples the second has no label, of tokens every
    fifth has none.
    """
    samples, tokens, classes = shape
    logits = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
    labels = torch.randint(classes, (samples, tokens))
    if tokens > 1:
        labels.view(-1)[::5] = ignore
    if samples > 2:
        labels[1] = ignore
    return Rows((logits.to(device), labels.to(device)), (temperature, floor, ignore))


def last_layer(
    shape=(9, 7), dtype=torch.float32, device="cpu", ignored=0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [classes, 6] and features of a layer whose output is logits of that shape, and labels,
    one at least.
    """
    weight, features = (
        torch.randn(*rows, 6, dtype=torch.float64) for rows in (shape[-1:], shape[:-1])
    )
    labels = torch.randint(shape[-1], shape[:-1])
    labels[torch.rand(shape[:-1]) < ignored] = IGNORE
    labels.view(-1)[0] = 0
    return weight.to(device, dtype).requires_grad_(), features.to(device, dtype), labels.to(device)


def squared_error(
    shape,
    dtype,
    device="cpu",
    *,
    temperature=0.5,
    floor=1e-6,
    mean=True,
    scale=1.0,
    relative=False,
) -> Rows:
    """``relative``: to references that differ a hundredfold; the cap is met by some."""
    pair = [
        (torch.randn(shape, dtype=torch.float64) * scale).to(dtype).to(device) for _ in range(2)
    ]
    if not relative:
        return Rows((*pair, None), (temperature, floor, mean, math.inf))
    reference = torch.logspace(0.0, 2.0, shape[0]).to(device)
    return Rows((*pair, reference), (temperature, floor, mean, max(3.0 * floor, 0.1)))


def soft_targets(
    shape,
    dtype,
    device="cpu",
    *,
    temperature=2.0,
    scale=3.0,
    weighted=True,
    offset=0.0,
    biased=False,
    masked=False,
) -> Rows:
    """Random logits and teacher, weights of both signs; of three or more samples the second has
    none. ``biased``: every fifth class but the first is forbidden; ``masked``: every third has no
    weight.
    """
    drawn = (torch.randn(shape, dtype=torch.float64) * scale + c for c in (0.0, offset))
    logits, teacher = (t.to(dtype).to(device) for t in drawn)
    weights = torch.randn(shape[0], device=device) if weighted else None
    if weighted and shape[0] > 2:
        weights[1] = 0.0
    bias, k = (torch.randn(shape[1]) for _ in range(2))
    bias[4::5], k[1::3] = -math.inf, 0.0
    bias, k = (t.to(device) if on else None for t, on in ((bias, biased), (k.abs(), masked)))
    return Rows((logits, teacher, weights, bias, k), (temperature,))


# what a call may be given beside the row weights
OF_CLASSES = {
    "plain": {},
    "biased": {"biased": True},
    "masked": {"masked": True},
    "both": {"biased": True, "masked": True},
}


def near(actual: Tensor, truth: Tensor, bound: Tensor, what: str) -> None:
    """|actual - truth| <= bound; where the truth is not finite, the same inf or NaN."""
    actual = actual.detach().cpu().double()
    assert actual.shape == truth.shape, (what, actual.shape, truth.shape)
    exact = torch.isfinite(truth)
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    wrong = ~torch.where(exact, (actual - truth).abs() <= bound, same)
    if wrong.any():
        i = int(wrong.reshape(-1).nonzero()[0])
        a, t, b = (x.expand(truth.shape).reshape(-1)[i].item() for x in (actual, truth, bound))
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.numel()} wrong, first [{i}]: {a}, not {t} +- {b:.2e}"
        )


def weight_bounds(losses, loss_error, counted, temperature, floor) -> dict[str, Tensor]:
    """``tolerances.weighted``, where the power is exp2 of an exponent split into a whole part and a
    rest.

    Of the rest, below 1 + temperature / 2, the products, the logarithm and the sums round: (3
    temperature + 2) U; the division by the least base rounds once.
    """

    def raw_of(base):
        return torch.where(counted, base.pow(-temperature), 0.0)

    bounds = tol.weighted(losses, loss_error, raw_of, temperature, floor)
    power = (4 * temperature + 2) * tol.U
    bounds["weight_relative"] = bounds["weight_relative"] + 2 * power
    bounds["weight_error"] = bounds["weight_error"] + bounds["weights"] * 2 * power
    bounds["normaliser_error"] = bounds["normaliser_error"] + bounds["normaliser"] * power
    bounds["loss_error"] = (
        bounds["loss_error"] + (bounds["weights"] * losses).abs().sum() * 2 * power
    )
    if bounds["normaliser"] > 0:
        bounds["log_normaliser_error"] = -torch.log1p(
            -bounds["normaliser_error"] / bounds["normaliser"]
        )
    else:
        bounds["log_normaliser_error"] = torch.zeros(())
    return bounds


def judge_cross_entropy(
    case: Rows, outputs, gradient: Tensor, pieces: int = 0, summed: bool = False
) -> None:
    """Every output against fp64. ``pieces`` = how often a long row's running sum may have been
    scaled anew.

    ``summed``: the outputs of the sum, whose total and gradient have not been divided by the
    normaliser.
    """
    logits, labels = (t.cpu() for t in case.tensors)
    temperature, floor, ignore = case.numbers
    wide, counted = logits.double(), labels != ignore
    truth = reference.adaptive_cross_entropy(wide, labels, temperature, floor, ignore)
    shift, log_sum = truth[4]
    label = torch.where(counted, labels, 0).unsqueeze(2)
    softmax = torch.exp((wide - shift.unsqueeze(2)) - log_sum.unsqueeze(2))
    distance = torch.where(wide.isinf(), 0.0, wide - shift.unsqueeze(2)).abs()
    own_distance, own_share = (t.gather(2, label).squeeze(2) for t in (distance, softmax))
    others = softmax.scatter(2, label, 0.0)
    # of each exponential the difference and its product with log2(e) round, then exp2; of the sum
    # every addition; scaling a running sum anew is one more exponential and a product
    rest = (others * distance).sum(dim=2) * 2 * tol.U
    rest = rest + others.sum(dim=2) * (
        (tol.roundings(wide.shape[2]) + pieces * 5) * tol.U + tol.FUNCTION
    )
    # the label's e^(x - shift) - 1 and what it is added to; all relative to the sum, of which the
    # logarithm is taken
    own = own_share * own_distance * 2 * tol.U + (own_share - torch.exp(-log_sum)).abs() * (
        tol.FUNCTION + tol.U
    )
    log_sum_error = (
        rest * (1 + 2 * tol.U) + own + others.sum(dim=2) * tol.U + log_sum.abs() * tol.FUNCTION
    )
    # without a label all classes are added, and 1 is taken away again
    log_sum_error = torch.where(counted, log_sum_error, log_sum_error + 2 * tol.FUNCTION)
    if not summed:
        near(outputs[4][0], shift, torch.zeros(()), "shift")
        near(outputs[4][1], log_sum, log_sum_error, "log_sum")
    row_losses = log_sum - (wide.gather(2, label).squeeze(2) - shift)
    token_error = log_sum_error + (own_distance + row_losses.abs()) * tol.U
    tokens = counted.sum(dim=1).clamp_min(1)
    loss_error = torch.where(counted, token_error, 0.0).sum(dim=1) / tokens + truth[1] * tol.U
    bounds = weight_bounds(truth[1], loss_error, counted.any(dim=1), temperature, floor)
    undivided = 1.0
    if summed:
        undivided = truth[3].exp()
        total_error = bounds["loss_error"] * undivided + truth[0].abs() * bounds["normaliser_error"]
        total_error = total_error * abs(case.grad) * 1.001 + tol.TINY[torch.float32]
        near(outputs[0], truth[0] * undivided * case.grad, total_error, "total")
        near(outputs[3], undivided, bounds["normaliser_error"], "normaliser")
        assert outputs[3].dtype == torch.float32
    else:
        near(outputs[0], truth[0], bounds["loss_error"], "loss")
        near(outputs[3], truth[3], bounds["log_normaliser_error"], "log_normaliser")
        assert outputs[3].dtype == torch.float64
    judge_samples(outputs, truth, loss_error, bounds)
    scale = torch.where(counted, (truth[2] / tokens).unsqueeze(1), 0.0).unsqueeze(2) * case.grad
    relative = (
        2 * tol.FUNCTION
        + 2 * (distance + log_sum.abs().unsqueeze(2)).nan_to_num(posinf=0.0) * tol.U
    )
    relative = torch.expm1(relative + log_sum_error.unsqueeze(2))
    expected = reference.adaptive_cross_entropy_backward(
        torch.tensor(case.grad, dtype=torch.float64), wide, labels, truth[2], truth[4], ignore
    )
    at_label = own_share * token_error + torch.expm1(-row_losses).abs() * tol.FUNCTION
    error = (softmax * relative).scatter(2, label, at_label.unsqueeze(2))
    error = scale.abs() * (error + EXP) + expected.abs() * (
        bounds["weight_relative"].view(-1, 1, 1) + 5 * tol.U
    )
    expected, error = expected * undivided, error * 1.001 * undivided
    near(gradient, expected, error + tol.stored(expected.abs() + error, logits.dtype), "gradient")
    assert gradient.dtype == logits.dtype


def judge_squared_error(case: Rows, outputs, gradient: Tensor) -> None:
    prediction, target, usual = (None if t is None else t.cpu() for t in case.tensors)
    temperature, floor, mean, cap = case.numbers
    wide = prediction.double(), target.double(), None if usual is None else usual.double()
    truth = reference.adaptive_mse(*wide, *case.numbers)
    samples, elements = prediction.shape
    loss_error = truth[1] * tol.squared_errors(elements) + 2.0**-149
    own, own_error, usual = tol.relative(truth[1], loss_error, usual)
    every = torch.ones(samples, dtype=torch.bool)
    bounds = weight_bounds(own, own_error, every, temperature, floor)
    bounds = tol.capped(bounds, own, own_error, floor, cap, usual)
    near(outputs[0], truth[0], bounds["loss_error"], "loss")
    near(outputs[3], truth[3], bounds["log_normaliser_error"], "log_normaliser")
    judge_samples(outputs, truth, loss_error, bounds)
    expected = reference.adaptive_mse_backward(
        torch.tensor(case.grad, dtype=torch.float64),
        prediction.double(),
        target.double(),
        truth[2],
        mean,
    )
    # the difference, the factor, three products
    error = expected.abs() * (bounds["weight_relative"].unsqueeze(1) + 5 * tol.U)
    near(
        gradient,
        expected,
        error * 1.001 + tol.stored(expected.abs() + error, prediction.dtype),
        "gradient",
    )
    assert gradient.dtype == prediction.dtype


def judge_soft_targets(case: Rows, outputs, gradient: Tensor, pieces: int = 0) -> None:
    tensors = [None if t is None else t.cpu() for t in case.tensors]
    bounds = tol.soft_target_kl(*tensors, case.numbers[0], case.grad, pieces, exp2=1)
    for name, output in zip(("loss", "losses", "log_sums"), outputs, strict=True):
        assert output.dtype == torch.float32
        near(output, *bounds[name], name)
    near(gradient, *bounds["gradient"], "gradient")
    assert gradient.dtype == case.tensors[0].dtype


def judge_samples(outputs, truth, loss_error, bounds) -> None:
    _, losses, weights = outputs[:3]
    for output in (*outputs[:3], *outputs[4:]):
        assert output.dtype == torch.float32
    near(losses, truth[1], loss_error, "losses")
    near(weights, truth[2], bounds["weight_error"], "weights")


# --- logits that arithmetic trips over ------------------------------------------------------------


def special_logits(kind: str, dtype: torch.dtype) -> Tensor:
    """[6, 1, 70]"""
    x = torch.randn(6, 1, 70, dtype=torch.float64)
    large = 6e4 if dtype == torch.float16 else 1e6
    if kind == "huge":
        x = x.clamp(-1, 1) * large
    elif kind == "very negative":  # exp(0 - maximum) would overflow
        x = x - min(large, 1e4)
    elif kind == "minus infinity":  # masked classes, a whole block of them, but never the label's
        x[:, :, 1:40] = -math.inf
    elif kind == "only the label":  # loss exactly 0: the floor must hold
        x[:, :, 1:] = -math.inf
    elif kind == "equal":
        x[:] = 2.0
    # losses of 1e-6: beside the label's, the other probabilities are below an ulp
    elif kind == "remembered":
        x[:, :, 0] = x[:, :, 1:].logsumexp(2) + math.log(1e6)
    return x.to(dtype)


SPECIAL = ["huge", "very negative", "minus infinity", "only the label", "equal", "remembered"]


def special_case(kind: str, dtype: torch.dtype, device="cpu") -> Rows:
    return Rows(
        (
            special_logits(kind, dtype).to(device),
            torch.zeros(6, 1, dtype=torch.int64, device=device),
        ),
        (0.5, 1e-6, IGNORE),
    )
