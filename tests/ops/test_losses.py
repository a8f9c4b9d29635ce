"""Adaptive losses as the recipes use them: weights, accumulation, sequences, floor, precision,
labels.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from sfron_fast import adaptive_cross_entropy, adaptive_mse, adaptive_weights, soft_target_kl
from sfron_fast.losses import LOSS_FLOOR, adaptive_cross_entropy_parts
from sfron_fast.ops import adaptive_mse as mse_op
from sfron_fast.ops import rows

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16]
)


def batch(samples=9, classes=5, dtype=torch.float64, tokens=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (samples,) if tokens is None else (samples, tokens)
    logits = 2 * torch.randn(*shape, classes, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(classes, shape, generator=generator)


def weights_of(losses, temperature, floor=LOSS_FLOOR):
    raw = [max(float(value), floor) ** -temperature for value in losses]
    return torch.tensor([r / sum(raw) for r in raw], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
@DTYPES
def test_adaptive_weights(temperature, dtype):
    losses = torch.tensor([2.0, 0.5, 0.0, 1e-3, 7.0], dtype=dtype, requires_grad=True)
    found = adaptive_weights(losses, temperature, 1e-4)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.requires_grad
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    expected = weights_of(losses.detach(), temperature, 1e-4)
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=0)
    assert abs(float(found.sum()) - 1) < 1e-6
    if temperature == 0:
        assert torch.equal(found, torch.full_like(found, 0.2))


def with_losses(losses):
    """Logits of two classes whose losses at label 0 are these, fp64."""
    return torch.stack([-losses.expm1().log(), torch.zeros_like(losses)], 1)


def every_weight(losses, temperature, dtype):
    """Weights [samples] and result of each way to them, of losses [samples] in fp64; nothing
    overflows on the way.
    """
    own = losses.to(dtype, copy=True).requires_grad_()
    weights = adaptive_weights(own, temperature)
    yield "adaptive_weights", weights, (weights * own).sum(), own
    logits = with_losses(losses).to(dtype).requires_grad_()
    labels = torch.zeros(len(losses), dtype=torch.int64)
    loss, _, weights, _ = adaptive_cross_entropy_parts(logits, labels, temperature)
    yield "cross_entropy", weights, loss, logits
    roots = losses.sqrt().unsqueeze(1).to(dtype).requires_grad_()
    target = torch.zeros(len(losses), 1, dtype=dtype)
    kernel = rows.kernel("adaptive_mse", mse_op.differentiable, roots)
    loss, _, weights, _ = kernel(roots, target, None, temperature, LOSS_FLOOR, True, math.inf)
    yield "mse", weights, loss, roots


@pytest.mark.parametrize(
    ("losses", "temperatures"),
    [([1e-7, 1.0, 2.0], (6.0, 7.0, 60.0)), ([30.0, 40.0, 50.0], (20.0, 40.0, 400.0))],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_temperature_overflows(losses, temperatures, dtype):
    """Remembered samples overflow l^-T, forgotten ones underflow it; w = softmax(-T log l) does
    neither.
    """
    losses = torch.tensor(losses, dtype=torch.float64)
    for temperature in (*temperatures, 1e30):
        wanted = torch.softmax(-temperature * losses.clamp_min(LOSS_FLOOR).log(), 0)
        for name, weights, loss, leaf in every_weight(losses, temperature, dtype):
            torch.testing.assert_close(
                weights.double(), wanted, rtol=0, atol=1e-6 * min(temperature, 50), msg=name
            )
            loss.backward()
            torch.testing.assert_close(
                loss.double(), (wanted * losses).sum(), rtol=1e-5, atol=1e-7, msg=name
            )
            assert torch.isfinite(leaf.grad).all()
            assert leaf.grad.any()


@DTYPES
def test_a_nan_loss_shows_in_every_weight(dtype):
    """Not in those of samples without a label, which have no part; nor is anything left
    unnormalised.
    """
    for name, weights, loss, _ in every_weight(
        torch.tensor([1.0, math.nan, 2.0], dtype=torch.float64), 0.5, dtype
    ):
        assert weights.isnan().all(), name
        assert loss.isnan(), name
    logits, labels = batch(4, 5, dtype)
    with torch.no_grad():
        logits[1, 2] = math.nan
    labels[3] = -100
    loss, losses, weights, normaliser = adaptive_cross_entropy_parts(logits, labels)
    assert loss.isnan()
    assert normaliser.isnan()
    assert losses.isnan().tolist() == [False, True, False, False]
    assert weights.isnan().tolist() == [True, True, True, False]
    assert weights[3] == 0


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cross_entropy_value_and_gradient(temperature, dtype):
    logits, labels = batch(dtype=dtype)
    loss = adaptive_cross_entropy(logits, labels, temperature)
    (3.0 * loss).backward()
    exact = logits.detach().double().requires_grad_()
    per_sample = F.cross_entropy(exact, labels, reduction="none")
    expected = (weights_of(per_sample.detach(), temperature) * per_sample).sum()
    (3.0 * expected).backward()
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=bound, atol=bound)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=bound, atol=bound)
    if temperature == 0:
        torch.testing.assert_close(
            loss.detach(), F.cross_entropy(logits.detach(), labels), rtol=bound, atol=bound
        )


@pytest.mark.parametrize("splits", [[9], [4, 5], [1] * 9, [1, 7, 1]])
@pytest.mark.parametrize("tokens", [None, 3])
def test_parts_accumulate_to_the_whole_batch(splits, tokens):
    """Trap 21: sum l^-lambda grad and sum l^-lambda apart, one division."""
    whole, labels = batch(tokens=tokens)
    adaptive_cross_entropy(whole, labels, 0.5).backward()
    logits = whole.detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for x, y in zip(logits.split(splits), labels.split(splits), strict=True):
        loss, losses, weights, normaliser = adaptive_cross_entropy_parts(x, y, 0.5)
        (loss * normaliser).backward()
        total += normaliser
        torch.testing.assert_close(loss.detach(), (weights * losses).sum())
        assert not any(t.requires_grad for t in (losses, weights, normaliser))
    torch.testing.assert_close(logits.grad / total, whole.grad, rtol=1e-13, atol=1e-16)
    if len(splits) > 1:  # the average of the parts is another objective
        averaged = whole.detach().clone().requires_grad_()
        for x, y in zip(averaged.split(splits), labels.split(splits), strict=True):
            (adaptive_cross_entropy(x, y, 0.5) * (len(y) / 9)).backward()
        assert (averaged.grad - whole.grad).abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sequences_average_over_labelled_tokens(dtype):
    logits, labels = batch(4, 5, dtype, tokens=6)
    labels[0, 2:], labels[1, 0], labels[3, :] = -100, -100, -100
    loss, losses, weights, _ = adaptive_cross_entropy_parts(logits, labels)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    rows = []
    for i in range(3):
        chosen = [t for t in range(6) if labels[i, t] != -100]
        rows.append(sum(F.cross_entropy(exact[i, t], labels[i, t]) for t in chosen) / len(chosen))
    expected = torch.stack(rows)
    w = weights_of(expected.detach(), 0.5)
    (w * expected).sum().backward()
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(
        losses.double(),
        torch.cat([expected.detach(), torch.zeros(1)]).double(),
        rtol=bound,
        atol=bound,
    )
    torch.testing.assert_close(
        weights.double(), torch.cat([w, torch.zeros(1)]), rtol=bound, atol=bound
    )
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=bound, atol=bound)
    assert not logits.grad[labels == -100].any()


def test_nothing_labelled_is_zero_not_nan():
    logits, labels = batch(3, 5, torch.float32, tokens=2)
    loss, _, weights, normaliser = adaptive_cross_entropy_parts(
        logits, torch.full_like(labels, -100)
    )
    loss.backward()
    assert loss == 0
    assert normaliser == 0
    assert not weights.any()
    assert not logits.grad.any()


def test_other_ignore_index():
    logits, labels = batch(4, 5, torch.float32)
    ignored = labels.clone()
    ignored[1] = 2
    torch.testing.assert_close(
        adaptive_cross_entropy(
            logits, torch.where(torch.arange(4) == 1, 7, labels), ignore_index=7
        ),
        adaptive_cross_entropy(logits[[0, 2, 3]], labels[[0, 2, 3]]),
    )


@DTYPES
def test_a_loss_of_zero_does_not_swallow_the_others(dtype):
    """Trap 7: without the floor the first sample would weigh 1 and every other 1e-12."""
    logits = torch.tensor([[60.0, 0.0], [0.5, 0.0], [1.0, 0.0]], dtype=dtype, requires_grad=True)
    labels = torch.zeros(3, dtype=torch.int64)
    loss, losses, weights, _ = adaptive_cross_entropy_parts(logits, labels)
    loss.backward()
    assert losses[0] < 1e-20
    expected = weights_of(
        [0.0, *F.cross_entropy(logits.detach().double(), labels, reduction="none")[1:]], 0.5
    )
    torch.testing.assert_close(weights.double(), expected, rtol=2e-3, atol=0)
    assert weights[1:].min() > 5e-4
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1:].abs().min() > 1e-4
    # the floor is a knob
    assert adaptive_cross_entropy_parts(logits, labels, floor=0.5)[2][0] < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_fp32(dtype):
    logits, labels = batch(dtype=dtype)
    loss, losses, weights, _ = adaptive_cross_entropy_parts(logits, labels)
    loss.backward()
    assert loss.dtype == losses.dtype == weights.dtype == torch.float32
    assert logits.grad.dtype == dtype
    exact = logits.detach().double().requires_grad_()
    expected = adaptive_cross_entropy(exact, labels)
    expected.backward()
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=1e-6, atol=0)
    rounding = torch.finfo(dtype).eps  # once, on the store
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mse(reduction, dtype):
    generator = torch.Generator().manual_seed(0)
    prediction = (
        torch.randn(5, 3, 2, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    )
    target = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64).to(dtype)
    loss = adaptive_mse(prediction, target, 0.5, reduction=reduction)
    loss.backward()
    exact = prediction.detach().double().requires_grad_()
    squares = ((exact - target.double()) ** 2).flatten(1)
    per_sample = squares.mean(1) if reduction == "mean" else squares.sum(1)
    expected = (weights_of(per_sample.detach(), 0.5) * per_sample).sum()
    expected.backward()
    bound = 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss.detach().double(), expected.detach(), rtol=bound, atol=bound)
    torch.testing.assert_close(prediction.grad.double(), exact.grad, rtol=bound, atol=bound)


@pytest.mark.parametrize("label", [5, -1, -99, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_labels_outside_the_classes(label, dtype):
    logits, labels = batch(dtype=dtype)
    labels[4] = label
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"labels: expected classes 0 to 4.*{label}"
    ):
        adaptive_cross_entropy(logits, labels)


LAZY = {
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "negated": lambda t: torch._neg_view(-t),
}


@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("loss", [adaptive_mse, soft_target_kl, adaptive_cross_entropy])
def test_values_that_are_not_in_memory(loss, argument, lazy):
    """torch keeps some zeros without memory, and some values with the other sign."""
    given = list(torch.randn(2, 4, 5))
    if loss is adaptive_cross_entropy:
        given[1] = torch.tensor([0, 3, 1, 4])
    given[argument] = LAZY[lazy](given[argument])
    plain = [t + 0 for t in given]
    assert torch.equal(loss(*given), loss(*plain))
