"""TRW, tilted reweighting (arXiv 2506.20893; in its ICML 2026 version TREW): a class is forgotten
by learning, on its samples, what a model that never saw it is likely to say of them.

    p~(k|x) = p0(k|x) e^(beta s_k) / Z  for k != f,   0 for k = f;   s = softmax(c / sharpness)

f the forgotten class, p0 the model before, c_k the cosine between what f and k are compared by, in
the space of its principal components; the softmax is over k != f. Of all distributions with the
same mean of s, p~ is the closest by KL to plain rescaling, which is beta 0.

    loss = mean over forget samples of KL(p~ || p) + retain_weight * mean l(retain)

Changes the model in place and returns it. Departures: the paper was read through its reviews, which
tell beta, 10, but not the sharpness and the number of components beside it; defaults are ours. The
paper compares classes by the last layer's rows; ``class_means`` of what it reads did better where
we tried (examples/vision/trw). KL has the gradient of the published cross-entropy. Each step takes
a forget and a retain batch.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import by_keyword, integer, number, require
from ..losses import soft_target_kl
from ..tasks import Task
from .descent import Loader, task_or_classification, teach
from .weighted import forget_and_retain


@by_keyword
def trw(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    forgotten: int,
    rows: Tensor,
    task: Task | None = None,
    beta: float = 2.0,
    components: int | None = None,
    sharpness: float = 0.3,
    retain_weight: float = 1.0,
    epochs: int = 10,
    lr: float = 0.01,
    **settings: Any,
) -> nn.Module:
    """TRW.

    Args:
        forget: batches of the forgotten class alone.
        forgotten: that class, a column of the logits.
        rows: what classes are compared by [classes, features], as in ``class_tilt``.
        beta, components, sharpness: as in ``class_tilt``.
        epochs: passes over the forget set.
        settings: of ``descend`` (momentum, weight_decay, max_norm, on_epoch).

    Raises:
        ValueError: a setting out of range, by name; an empty loader; samples of another class.
    """
    task = task_or_classification(task)
    task.needs("targets", "logits")
    tilt = class_tilt(rows, forgotten, beta=beta, components=components, sharpness=sharpness)
    original = copy.deepcopy(model)  # BatchNorm's running statistics too

    def forget_loss(batch: Any, ids: Tensor) -> Tensor:
        before = teach(original, batch, task)
        classes = before.shape[1]
        require(classes == len(tilt), "rows", f"one for each of {classes} classes", len(tilt))
        labels = task.targets(batch)
        others = labels[labels != forgotten].unique().tolist()
        require(not others, "forget", f"samples of class {forgotten} alone", f"also of {others}")
        logits = task.logits(task.outputs(model, batch), batch)
        return soft_target_kl(logits, before, class_bias=tilt.to(before.device))

    return forget_and_retain(
        model,
        forget_loss,
        forget=forget,
        retain=retain,
        retain_weight=retain_weight,
        task=task,
        epochs=epochs,
        lr=lr,
        **{"optimizer": "sgd", "cosine": True, "weight_decay": 5e-4, **settings},
    )


def class_tilt(
    rows: Tensor,
    forgotten: int,
    *,
    beta: float,
    components: int | None = None,
    sharpness: float = 0.3,
) -> Tensor:
    """beta s_k, -inf at the forgotten class, fp64 [classes]: what is added to logits of before.

    Args:
        rows: what classes are compared by [classes, features]: the weight of the last layer, as
            published, or ``class_means``. Their mean is taken off.
        components: how many principal components of the rows cosines are taken in; None = all.
        beta: 0 = plain rescaling.
        sharpness: temperature of the softmax over cosines; small = the nearest class alone.

    Raises:
        ValueError: fewer than three classes, rows that are not finite, a setting out of range.
    """
    shaped = isinstance(rows, Tensor) and rows.dim() == 2 and len(rows) > 2
    found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
    require(shaped, "rows", "[classes >= 3, features]", found)
    require(bool(rows.isfinite().all()), "rows", "finite numbers", "NaN or inf")
    forgotten = integer("forgotten", forgotten, 0, len(rows) - 1)
    number("beta", beta, 0.0)
    number("sharpness", sharpness, 0.0, open_low=True)
    most = min(len(rows) - 1, rows.shape[1])
    kept = most if components is None else integer("components", components, 1, most)
    centred = rows.detach().double() - rows.detach().double().mean(0)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    places = (left * singular)[:, :kept]
    cosines = torch.cosine_similarity(places[forgotten], places, dim=1)
    cosines[forgotten] = -math.inf
    tilt = beta * (cosines / sharpness).softmax(0)
    tilt[forgotten] = -math.inf
    return tilt


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """The mean of each class, fp64 [classes, features]: what classes may be compared by in place of
    the last layer's rows.

    Args:
        features: of samples of all classes [samples, features]: what the last layer reads, or its
            logits.
        labels: int64 [samples].

    Raises:
        ValueError: other shapes, or a class without a sample.
    """
    shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
    matched = features.dim() == 2 and labels.shape == features.shape[:1]
    require(matched, "features", "[samples, features], and as many labels", shapes)
    members = nn.functional.one_hot(labels).double()
    counts = members.sum(0)
    none = (counts == 0).nonzero().flatten().tolist()
    require(not none, "labels", "samples of every class", f"none of {none}")
    return members.T @ features.double() / counts.unsqueeze(1)
