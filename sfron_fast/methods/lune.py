"""LUNE (arXiv 2512.07375): wrong answers only, learnt by low-rank adapters on a frozen model.

    loss = mean over (x, y-) of -log p(y- | x) of the model with adapters;    min over A, B alone

y- an answer to the question x that is not the one to forget: another value, a denial, in many
wordings, the same question with several of them. One refusal for all is learnt as the answer to
every question and takes the rest of the model along (examples/language/lune shows it).

Departures: the paper's text was not at hand, the equation and the defaults are as others have
reported them. No warm-up; no early stop at a loss of utility (``on_epoch`` sees the model).
Which negatives sound too uncertain is for whoever writes them: none is filtered here. A sequence's
loss is the mean over its tokens, as elsewhere here. The retain term is one reporter's, and off.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..data.batches import model_device
from ..data.endless import EndlessLoader
from ..errors import by_keyword, number, require
from ..tasks import Task
from ..tasks.task import check_depends
from .descent import Loader, batches, descend, task_or_classification
from .original import adapters_alone
from .weighted import USUAL


@by_keyword
def lune(
    model: nn.Module,
    *,
    negatives: Loader,
    retain: Loader | None = None,
    task: Task | None = None,
    rank: int = 16,
    alpha: float = 16.0,
    dropout: float = 0.05,
    retain_weight: float = 1.0,
    seed: int = 0,
    epochs: int = 1,
    lr: float = 2e-4,
    **settings: Any,
) -> nn.Module:
    """LUNE, in place: the model with its adapters is returned.

    Adapters are put on every linear layer but the head; a model that has some (a second run, or
    one of peft, not merged) keeps them, and they go on from where they are. All other weights keep
    their bits. ``merge_lora`` writes the change into the weights: do so before the model is given
    away, as ``lora_off`` brings all knowledge back.

    Args:
        negatives: batches of the task: a question to forget with a wrong answer as its label.
        retain: batches whose mean loss, times ``retain_weight``, is added to each step's; None =
            negatives alone, as published.
        rank, alpha, dropout, seed: of ``add_lora``, for a model without adapters.
        settings: of ``descend``; AdamW, a constant lr, a weight decay of .01 and a clip at 1 if
            they do not say otherwise.

    Raises:
        ValueError: a setting out of range, by name; an empty loader; no linear layer; a mask.
    """
    number("retain_weight", retain_weight, 0.0)
    number("lr", lr, 0.0)
    require("mask" not in settings, "mask", "none", "one", "the adapters are what is trained")
    task = task_or_classification(task)
    device = model_device(model)
    kept = None if retain is None else EndlessLoader(retain, "retain")

    def terms(batch: Any) -> Iterator[Tensor]:
        loss = task.mean_loss(model, batch)
        check_depends(loss, task)
        yield loss
        if kept is not None and retain_weight > 0.0:
            yield retain_weight * task.mean_loss(model, kept.batch(task, device))

    def losses(_: int) -> Iterator[Iterator[Tensor]]:
        for batch in batches(model, negatives, "negatives", task):
            yield terms(batch)

    with adapters_alone(model, rank=rank, alpha=alpha, dropout=dropout, seed=seed):
        return descend(
            model, losses, epochs=epochs, lr=lr, **{**USUAL, "max_norm": 1.0, **settings}
        )
