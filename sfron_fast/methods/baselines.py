"""The baselines of the paper, each by what it puts in the places of SFR-on's parts.

            (S) saliency        (F) forgetting part              (R) remaining part
    FT      -                   -                                descent on the retain set
    GA      -                   ascent on the forget set         -
    RL      -                   wrong labels                     descent on the retain set
    SalUn   hard, for F and R   wrong labels                     descent on the retain set
    BT      -                   an untrained teacher             the original as teacher
    SCRUB   -                   away from the original           descent, the original as teacher
    SA      -                   towards uniform predictions      descent, penalty by a Fisher estimated once

All change the model in place and return it. Defaults are those of the authors' code for CIFAR-10
and ResNet-18; SA has none there. Further keywords go to ``descend`` (momentum, weight_decay,
max_norm, on_epoch).
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import call, cross_entropy, model_device
from ..data.endless import EndlessLoader
from ..errors import by_keyword, number, require
from ..losses import soft_target_kl
from ..models.modes import evaluating, recording
from ..saliency.fisher import Estimator, estimate_fisher
from ..saliency.mask import SaliencyMask
from .descent import Losses, batches, descend

Loader = Iterable[Any]  # of batches (inputs, targets); read once an epoch


def finetune(
    model: nn.Module, retain: Loader, *, epochs: int = 10, lr: float = 0.01, **settings: Any
) -> nn.Module:
    """FT: go on training on the retain set."""
    return descend(
        model,
        _cross_entropies(model, retain, "retain"),
        epochs=epochs,
        lr=lr,
        **settings,
    )


def gradient_ascent(
    model: nn.Module,
    forget: Loader,
    *,
    epochs: int = 9,
    lr: float = 1e-4,
    max_norm: float = 0.1,
    **settings: Any,
) -> nn.Module:
    """GA: clipped ascent on the forget set, BatchNorm in eval mode, lr constant."""
    losses = _cross_entropies(model, forget, "forget", sign=-1.0)
    settings = {"cosine": False, "training": False, "max_norm": max_norm, **settings}
    return descend(model, losses, epochs=epochs, lr=lr, **settings)


def random_label(
    model: nn.Module, mixed: Loader, *, epochs: int = 10, lr: float = 0.003, **settings: Any
) -> nn.Module:
    """RL: train on the retain set and the forget set under one fixed wrong label each
    (``wrong_labels``).

    ``mixed``: batches of both, shuffled together.
    """
    return descend(
        model,
        _cross_entropies(model, mixed, "mixed"),
        epochs=epochs,
        lr=lr,
        **settings,
    )


@by_keyword
def salun(
    model: nn.Module,
    *,
    forget: Loader,
    mixed: Loader,
    fraction: float = 0.2,
    epochs: int = 10,
    lr: float = 0.007,
    **settings: Any,
) -> nn.Module:
    """SalUn: RL in which only the ``fraction`` of weights of ``gradient_saliency`` move.

    The others keep their bits, as in the authors' code since they made the mask a hard constraint;
    before, it masked gradients only, and weight decay moved all weights.

    ``mixed`` as for ``random_label``; ``forget`` has the true labels.
    """
    mask = gradient_saliency(model, forget, fraction)
    return random_label(model, mixed, epochs=epochs, lr=lr, mask=mask, **settings)


def bad_teacher(
    model: nn.Module,
    mixed: Loader,
    incompetent: nn.Module,
    *,
    temperature: float = 1.0,
    epochs: int = 10,
    lr: float = 0.02,
    **settings: Any,
) -> nn.Module:
    """BT: match the ``incompetent`` (untrained) model on the forget set and the original on the
    retain
    set.

    The loss is the mean of p log(p / q) over samples and classes, as the authors' code takes it.

    ``mixed``: batches (inputs, forgotten) of both sets, shuffled together; ``forgotten`` is
    bool [samples].
    """
    competent = copy.deepcopy(model)

    def losses(_: int) -> Any:
        for inputs, forgotten in batches(model, mixed, "mixed"):
            require(
                forgotten.dtype == torch.bool,
                "mixed",
                "bool targets: forgotten or not",
                forgotten.dtype,
            )
            good, bad = _teach(competent, inputs), _teach(incompetent, inputs)
            logits = call(model, inputs)
            weights = torch.full((len(logits),), 1.0 / logits.numel(), device=logits.device)
            yield soft_target_kl(
                logits, torch.where(forgotten[:, None], bad, good), weights, temperature
            )

    return descend(model, losses, epochs=epochs, lr=lr, **settings)


@by_keyword
def scrub(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    ascent_epochs: int = 2,
    temperature: float = 4.0,
    label_weight: float = 0.99,
    teacher_weight: float = 0.001,
    epochs: int = 6,
    lr: float = 8e-5,
    **settings: Any,
) -> nn.Module:
    """SCRUB: in the first epochs away from the original on the forget set; in each, near it on the
    retain set.
    """
    original = copy.deepcopy(model)

    def losses(epoch: int) -> Any:
        if epoch < ascent_epochs:
            for inputs, _ in batches(model, forget, "forget"):
                yield -soft_target_kl(
                    call(model, inputs), _teach(original, inputs), temperature=temperature
                )
        for inputs, labels in batches(model, retain, "retain"):
            logits = call(model, inputs)
            near = soft_target_kl(logits, _teach(original, inputs), temperature=temperature)
            yield label_weight * cross_entropy(logits, labels) + teacher_weight * near

    return descend(model, losses, epochs=epochs, lr=lr, **settings)


@by_keyword
def selective_amnesia(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    penalty: float = 10.0,
    estimator: Estimator = "sample",
    epochs: int = 10,
    lr: float = 0.01,
    **settings: Any,
) -> nn.Module:
    """SA, for classifiers: uniform predictions on the forget set, the retain set replayed, and
    elastic
    weights.

    The penalty is penalty / 2 sum F (theta - theta_0)^2 with the retain set's diagonal Fisher at
    the start, which is never estimated again. Each step takes a retain and a forget batch.
    Published for generative models (Heng and Soh, NeurIPS 2023), where a sample of noise is what
    the uniform prediction is here.
    """
    number("penalty", penalty, 0.0)
    fisher = estimate_fisher(model, retain, estimator=estimator)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    endless, device = EndlessLoader(forget, "forget"), model_device(model)

    def losses(_: int) -> Any:
        for inputs, labels in batches(model, retain, "retain"):
            kept = cross_entropy(call(model, inputs), labels)
            logits = call(model, endless.pair(device)[0])
            gone = soft_target_kl(logits, torch.zeros_like(logits))
            named = dict(model.named_parameters())
            anchor = torch.stack(
                [(fisher[n] * (named[n] - w).square()).sum() for n, w in start.items()]
            ).sum()
            yield kept + gone + 0.5 * penalty * anchor

    return descend(model, losses, epochs=epochs, lr=lr, **settings)


def wrong_labels(labels: Tensor, classes: int, generator: torch.Generator | None = None) -> Tensor:
    """One label of the other ``classes - 1`` for each of int64 [samples], evenly drawn, on the
    labels' device.
    """
    require(classes > 1, "classes", "an integer > 1", classes)
    shift = torch.randint(1, classes, labels.shape, generator=generator)
    return (labels + shift.to(labels.device)) % classes


def gradient_saliency(model: nn.Module, forget: Loader, fraction: float = 0.5) -> SaliencyMask:
    """SalUn's mask: the ``fraction`` of weights where the forget batches' gradients sum to most, in
    eval mode.
    """
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with evaluating(model), recording(model):
        sums = {n: torch.zeros_like(p) for n, p in named.items()}
        for loss in _cross_entropies(model, forget, "forget")(0):
            grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
            torch._foreach_add_(list(sums.values()), list(grads))
    size = {n: s.float().abs() for n, s in sums.items()}
    ones = {n: torch.ones_like(s) for n, s in size.items()}
    return SaliencyMask.top_k(forget=size, retain=ones, fraction=fraction)


def _cross_entropies(model: nn.Module, loader: Loader, name: str, sign: float = 1.0) -> Losses:
    return lambda _: (
        sign * cross_entropy(call(model, x), y) for x, y in batches(model, loader, name)
    )


def _teach(teacher: nn.Module, inputs: Any) -> Tensor:
    with evaluating(teacher), torch.no_grad():
        return call(teacher, inputs)
