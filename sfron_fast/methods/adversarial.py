"""The nearest adversarial example of each sample: L2 projected gradient descent in a ball that
grows only for the samples that still resist.

    x <- clip(x0 + P_r(x + r / 10 * g / |g| - x0)),    g = gradient of log((1 - p_y) / p_y) in x

P_r shortens what is longer than the radius r; a sample is done at the first wrong answer, r is
doubled for the others after ``steps`` steps. As the authors of AMUN do (pgdl2_modified.py), but for
g: theirs is the gradient of the cross-entropy, which is (1 - p_y) g. It points the same way and
fades where the model is certain, so that with their 1e-10 beside the norm such samples stand still.

A step is one pass over the model, of the samples that are left, and three row operations of plain
torch: 0.2 % of the step for a ResNet-18 on 32 x 32, 3 to 10 % for three convolutions on 8 x 8.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.batches import call
from ..errors import integer, number, require
from ..models.modes import evaluating, recording
from ..tasks import Classification
from ..tasks.classification import check_classes
from ..tasks.labels import check_labels
from .descent import batches
from .original import only

DOUBLINGS = 16  # of the radius, before a sample counts as out of reach
STEP = 0.1  # a step's length, of the radius


class Adversarial(NamedTuple):
    """Samples that a model gets wrong, each near one that it may have got right."""

    inputs: Tensor  # [samples, ...]
    labels: Tensor  # int64 [samples], what the model says of them
    distances: Tensor  # [samples], L2 to where they came from; 0 = that was got wrong already


def adversarial_examples(
    model: nn.Module,
    forget: Iterable[Any],
    *,
    radius: float = 0.04,
    steps: int = 50,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Adversarial:
    """The nearest adversarial example of every sample, in eval mode; the model stays as it is.

    Args:
        forget: batches (inputs, labels): one floating tensor [samples, ...], int64 [samples].
        radius: of the first ball.
        steps: in each ball.
        bounds: least and largest value of an input, which examples keep to; None = any, as for
            images that are normalised.

    Raises:
        ValueError: a setting out of range, by name; inputs of another kind or out of bounds; a
            sample that keeps its label in the largest ball (``radius`` * 2^16).
    """
    number("radius", radius, 0.0, open_low=True)
    integer("steps", steps, 1)
    low, high = _limits(bounds)
    found = []
    with only(model, []), evaluating(model), recording(model):
        for inputs, labels in batches(model, forget, "forget", Classification()):
            _check(inputs, low, high)
            found.append(_nearest(model, inputs, labels, radius, steps, low, high))
    return Adversarial(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _nearest(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    radius: float,
    steps: int,
    low: float,
    high: float,
) -> Adversarial:
    """Of one batch. Whoever resists is moved; who does not has left the batch."""
    examples, answers = inputs.clone(), labels.clone()
    left = torch.arange(len(labels), device=labels.device)
    start, x, y = inputs, inputs, labels
    for step in range(steps * (DOUBLINGS + 1)):
        ball = radius * 2.0 ** (step // steps)
        x = x.detach().requires_grad_()
        logits = call(model, x)
        if step == 0:
            check_classes(logits, y)
            check_labels(logits, y)
        said = logits.argmax(1)
        resists = said == y
        grads = _towards_others(logits, x, y)
        if not bool(resists.all()):
            gone = left[~resists]
            examples[gone], answers[gone] = x.detach()[~resists], said[~resists]
            left, start, y = left[resists], start[resists], y[resists]
            x, grads = x[resists], grads[resists]
            if not len(left):
                break
        with torch.no_grad():
            moved = x + ball * STEP * F.normalize(grads.flatten(1)).view_as(x) - start
            x = start + moved.renorm(2, 0, ball)
            x = x.clamp(low, high)
    within = f"a wrong answer within {ball:g} of every sample"
    found, remedy = f"none for {len(left)} of {len(labels)}", "give wider bounds, or more steps"
    require(not len(left), "model", within, found, remedy)
    return Adversarial(examples, answers, (examples - inputs).flatten(1).norm(dim=1))


def _towards_others(logits: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient in x of log((1 - p_y) / p_y) of each sample: its cross-entropy's, over 1 - p_y.

    In the logits it is the probabilities without the label's, which is -1.
    """
    at = y[:, None]
    others = logits.detach().scatter(1, at, -torch.inf).softmax(1)
    return torch.autograd.grad(logits, x, others.scatter(1, at, -1.0))[0]


def _limits(bounds: tuple[float, float] | None) -> tuple[float, float]:
    if bounds is None:
        return -torch.inf, torch.inf
    pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2 and bounds[0] < bounds[1]
    require(pair, "bounds", "None or (least, largest)", repr(bounds))
    return bounds[0], bounds[1]


def _check(inputs: Any, low: float, high: float) -> None:
    floats = isinstance(inputs, Tensor) and inputs.is_floating_point()
    found: object = inputs.dtype if isinstance(inputs, Tensor) else type(inputs).__name__
    require(floats, "forget", "inputs of one floating tensor", found)
    least, largest = float(inputs.min()), float(inputs.max())  # NaN fails both
    remedy = "give the bounds of your inputs, or None"
    inside = least >= low and largest <= high
    require(inside, "bounds", f"inputs in [{low}, {high}]", f"{least:g} to {largest:g}", remedy)
