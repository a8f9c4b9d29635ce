"""Hidden states, heads and labels, and what judges the ops over them: all logits in fp64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfron_fast.ops import linear_tiles


@dataclass
class HeadCase:
    """Arguments of an op over a head; ``upstream`` [outputs, rows]."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    upstream: Tensor
    numbers: dict[str, Any]

    def to(self, dtype) -> "HeadCase":
        tensors = {name: getattr(self, name) for name in ("hidden", "weight", "bias")}
        moved = {k: None if t is None else t.detach().to(dtype) for k, t in tensors.items()}
        return replace(self, **moved)

    def on(self, device) -> "HeadCase":
        names = ("hidden", "weight", "bias", "labels", "upstream")
        tensors = {name: getattr(self, name) for name in names}
        return replace(self, **{k: None if t is None else t.to(device) for k, t in tensors.items()})

    def results(self, function: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
        """What the function returns, and the gradients of hidden, weight and bias."""
        leaves = {
            name: getattr(self, name).detach().clone().requires_grad_()
            for name in ("hidden", "weight", "bias")
            if getattr(self, name) is not None
        }
        bias = leaves.get("bias")
        outputs = function(
            leaves["hidden"], leaves["weight"], self.labels, bias=bias, **self.numbers
        )
        pairs = zip(outputs, self.upstream, strict=True)
        sum((o * g.to(o.dtype)).sum() for o, g in pairs).backward()
        found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
        return found | {f"d {name}": leaf.grad for name, leaf in leaves.items()}


def head_case(
    rows=37,
    features=16,
    classes=203,
    dtype=torch.float32,
    *,
    bias=True,
    softcap=None,
    logit_scale=1.0,
    size=1.0,
    ignored=5,
    decades=5,
) -> HeadCase:
    """Upstream gradients of both signs over ``decades``; every ``ignored``-th row has no label, and
    NaN for its hidden state.
    """
    torch.manual_seed(rows + classes)
    hidden, weight = torch.randn(rows, features), torch.randn(classes, features) * size
    labels = torch.randint(classes, (rows,))
    upstream = torch.randn(2, rows) * 10.0 ** (torch.rand(2, rows) * decades - decades / 2)
    if ignored:
        labels[::ignored] = -100
        hidden[::ignored] = torch.nan
    given = torch.randn(classes) if bias else None
    numbers = {"softcap": softcap, "logit_scale": logit_scale}
    return HeadCase(hidden, weight, labels, given, upstream, numbers).to(dtype)


def remembered_case(loss: float, at: float, rows=31, features=16, classes=203) -> HeadCase:
    """Every token's loss is about ``loss`` and its logits about ``at``; upstream of logp alone, as
    d lse is all of p.

    Each row has a feature of its own, by which its label's logit is set, and one for ``at``.
    """
    torch.manual_seed(rows)
    labels = torch.randperm(classes)[:rows]
    weight = torch.cat([torch.randn(classes, features + rows), torch.full((classes, 1), at)], 1)
    weight[:, features : features + rows] = 0.0
    weight[labels, :features] = 0.0
    hidden = torch.cat([torch.randn(rows, features), torch.eye(rows), torch.ones(rows, 1)], 1)
    others = (hidden[:, :features] @ weight[:, :features].t()).double()
    others = others.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    needed = others - torch.tensor(loss, dtype=torch.float64).expm1().log()
    weight[labels, features + torch.arange(rows)] = needed.float()
    upstream = torch.randn(2, rows) * torch.tensor([[1.0], [0.0]])
    numbers = {"softcap": None, "logit_scale": 1.0}
    return HeadCase(hidden, weight, labels, None, upstream, numbers)


def full_logits(hidden, weight, labels, *, bias=None, softcap=None, logit_scale=1.0):
    """logp, lse [rows], 0 where ignored, from all logits, by torch alone."""
    kept = labels != -100
    logits = torch.nn.functional.linear(hidden[kept], weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logp = -torch.nn.functional.cross_entropy(logits, labels[kept], reduction="none")
    zeros = logp.new_zeros(labels.shape)
    return zeros.masked_scatter(kept, logp), zeros.masked_scatter(kept, logits.logsumexp(1))


def error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-300))


def small_tiles(monkeypatch, classes=64) -> None:
    """So that a small head has several tiles."""
    monkeypatch.setitem(linear_tiles.TILE_CLASSES, "cpu", classes)
