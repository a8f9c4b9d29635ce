"""The normaliser left to the optimizer: ``adaptive_cross_entropy_sum_`` gives the loss's step."""

from functools import partial

import pytest
import tolerances as tol
import torch
import torch.nn.functional as F
from row_cases import last_layer

import sfron_fast as sf

SAMPLES, FEATURES, FORGET_WEIGHT = 40, 6, 2.0
STEPS = {
    "sgd": lambda p, **knobs: sf.SFRonSGD(p, lr=0.5, momentum=0.9, weight_decay=1e-3, **knobs),
    "adamw": lambda p, **knobs: sf.SFRonAdamW(p, lr=0.05, weight_decay=1e-2, **knobs),
}


def setting(kind, **knobs):
    """A last layer, its optimizer with a mask, a batch."""
    torch.manual_seed(3)
    weight, features, labels = last_layer((SAMPLES, 11), ignored=0.2)
    layer = torch.nn.Linear(FEATURES, 11, bias=False)
    layer.weight.data.copy_(weight.detach())
    mask = sf.SaliencyMask.from_bool({"weight": torch.arange(66).view(11, 6) % 3 > 0})
    return layer, STEPS[kind](layer.named_parameters(), saliency=mask, **knobs), features, labels


def plain_step(layer, optimizer, features, labels):
    (-FORGET_WEIGHT * sf.adaptive_cross_entropy(layer(features), labels)).backward()
    optimizer.forget_step()


def deferred_step(layer, optimizer, features, labels, pieces=SAMPLES):
    normalisers = []
    for x, y in zip(features.split(pieces), labels.split(pieces), strict=True):
        loss, normaliser = sf.adaptive_cross_entropy_sum_(layer(x), y, scale=-FORGET_WEIGHT)
        loss.backward()
        normalisers.append(normaliser)
    optimizer.grad_scale = sum(normalisers)
    optimizer.forget_step()
    optimizer.grad_scale = None


def gradient_bound(layer, features, labels):
    """How far the deferred gradient of the weight may be from the plain one, element by element.

    A logit's gradient is a product of factors that each round: plain the weight, its division by
    the normaliser, upstream and the product (4), deferred the weight, the product, the normaliser,
    its reciprocal and the product with that (5); both take exp and lse from the same formula on the
    same logits. Then a sum over the samples, twice.
    """
    logits = layer(features).detach().double().requires_grad_()
    sf.adaptive_cross_entropy(logits, labels).backward()
    terms = FORGET_WEIGHT * logits.grad.abs().t() @ features.double().abs()
    return terms * (9 + 2 * tol.roundings(SAMPLES)) * tol.U


@pytest.mark.parametrize("pieces", [SAMPLES, 7], ids=["one batch", "accumulated"])
@pytest.mark.parametrize("max_norm", [None, 1e-2], ids=["free", "clipped"])
@pytest.mark.parametrize("kind", STEPS)
def test_deferred_step_is_the_plain_step(kind, max_norm, pieces):
    """Masked, clipped, decayed: the division by ``grad_scale`` comes before all of it.

    Then a retain step of each.
    """
    ends, gradients = [], []
    for step in (plain_step, partial(deferred_step, pieces=pieces)):
        layer, optimizer, features, labels = setting(kind, max_norm=max_norm)
        start = layer.weight.detach().double()
        bound = gradient_bound(layer, features, labels)
        step(layer, optimizer, features, labels)
        gradients.append(layer.weight.grad.double())
        forgotten = layer.weight.detach().double()
        optimizer.zero_grad()
        F.cross_entropy(layer(features), labels).backward()
        optimizer.step()
        ends.append((forgotten, layer.weight.detach().double(), optimizer))
    assert [end[2].skipped_steps for end in ends] == [0, 0]
    selected = torch.arange(66).view(11, 6) % 3 > 0
    gradient, bound = gradients[0] * selected, bound * selected
    assert (bound < 1e-4 * gradient.abs().max()).all()
    assert not torch.allclose(gradients[1] * selected, gradient, rtol=0.5)  # it is not divided yet
    # clipped, an element moves with its own error and with that of the norm
    norm = gradient.norm()
    factor = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    moved = factor * (
        bound
        + (gradient.abs() * bound.norm() / norm if max_norm else 0.0)
        + 8 * tol.U * gradient.abs()
    )
    if kind == "sgd":
        moved = moved * 0.5  # the learning rate
    else:  # the first step of Adam is g / (|g| + eps), whose derivative is eps / (|g| + eps)^2
        size = (factor * gradient.abs() - moved).clamp_min(0.0)
        moved = 0.05 * (1e-8 / (size + 1e-8) ** 2 * moved + 16 * tol.U * selected)
    moved = moved + 4 * tol.U * start.abs()
    (plain, plain_end, plain_optimizer), (deferred, deferred_end, optimizer) = ends
    assert ((plain - start).abs() * selected).max() > 1e3 * moved.max()
    assert ((deferred - plain).abs() <= moved).all()
    assert abs(optimizer.grad_norm - plain_optimizer.grad_norm) <= bound.norm() + 8 * tol.U * norm
    # the retain step sees whole gradients again; over one step nearby weights stay nearby
    assert (deferred_end - plain_end).abs().max() <= 20 * (deferred - plain).abs().max() + 1e-5


def test_deferred_step_without_any_label_is_skipped():
    """Its normaliser is 0, and 0 / 0 is no gradient; plain it is a step on a gradient of 0."""
    layer, optimizer, features, labels = setting("sgd", max_norm=1.0)
    before = layer.weight.detach().clone()
    deferred_step(layer, optimizer, features, torch.full_like(labels, -100))
    assert optimizer.skipped_steps == 1
    assert torch.equal(layer.weight.detach(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_deferred_gradient_in_half_precision(dtype):
    """Rounded at another size, not more often: each logit's gradient once, the weight's once, by
    either way.
    """
    layer, _, features, labels = setting("sgd")
    layer.to(dtype)
    x = features.to(dtype)
    (plain,) = torch.autograd.grad(
        -FORGET_WEIGHT * sf.adaptive_cross_entropy(layer(x), labels), layer.weight
    )
    loss, normaliser = sf.adaptive_cross_entropy_sum_(layer(x), labels, scale=-FORGET_WEIGHT)
    (deferred,) = torch.autograd.grad(loss, layer.weight)
    eps = tol.EPS[dtype]
    logits = F.linear(x, layer.weight).detach().double().requires_grad_()
    sf.adaptive_cross_entropy(logits, labels).backward()
    terms = FORGET_WEIGHT * logits.grad.abs().t() @ x.double().abs()
    bound = (
        terms * (eps + 2e-5) + plain.double().abs() * eps * 1.1 + 1e-6 * (dtype == torch.float16)
    )
    assert ((deferred.double() / normaliser.double() - plain.double()).abs() <= bound).all()
    assert bound.max() < 4 * eps * plain.double().abs().max()
