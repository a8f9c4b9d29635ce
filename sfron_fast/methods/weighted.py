"""What the language methods share: a loss on a forget batch, ``retain_weight`` times the mean loss
of a retain batch, and one step on both.

Their published losses are sums, so each term has a backward pass of its own, and one graph is alive
at a time. The forget losses of WGA, SatImp, CE-U, NPO and SimNPO are detached weights
(``sfron_fast.weights``) times log-likelihoods.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import model_device
from ..data.endless import EndlessLoader
from ..errors import number, require
from ..evaluation.reference_losses import ReferenceLosses, reference_losses
from ..tasks import Task
from ..tasks.task import Units, check_depends
from .descent import Loader, batches, descend, task_or_classification

Ids = Callable[[Any], Tensor]  # of a prepared batch the numbers of its samples, int64 [samples]
# settings of ``descend`` that language models are trained with
USUAL: dict[str, Any] = {"optimizer": "adamw", "cosine": False, "weight_decay": 0.01}
ForgetLoss = Callable[[Any, Tensor], Tensor]  # (prepared batch, ids [samples]) -> []


def forget_and_retain(
    model: nn.Module,
    forget_loss: ForgetLoss,
    *,
    forget: Loader,
    retain: Loader,
    task: Task,
    retain_weight: float,
    retain_loss: Callable[[Any], Tensor] | None = None,
    forget_task: Task | None = None,
    ids: Ids | None = None,
    **settings: Any,
) -> nn.Module:
    """One step a forget batch, an epoch for each pass over them; retain batches come in turn.

    Args:
        forget_loss: what is descended on a forget batch.
        retain_loss: what is descended on a retain batch, times ``retain_weight``; None = its mean
            loss.
        forget_task: reads the forget batches; None = ``task``, as the retain batches.
        ids: as ``reference_losses``; None = positions in the pass, which ``forget_loss`` may only
            use if the loader does not shuffle.
        settings: of ``descend``; AdamW, a constant lr and a weight decay of .01 if they do not say
            otherwise.

    Raises:
        ValueError: a setting out of range, by name; an empty loader.
    """
    number("retain_weight", retain_weight, 0.0)
    reads = task if forget_task is None else forget_task
    endless, device = EndlessLoader(retain, "retain"), model_device(model)

    def terms(batch: Any, samples: Tensor) -> Iterator[Tensor]:
        loss = forget_loss(batch, samples)
        check_depends(loss, task)
        yield loss
        if retain_weight > 0.0:
            kept = endless.batch(task, device)
            mean = task.mean_loss(model, kept) if retain_loss is None else retain_loss(kept)
            yield retain_weight * mean

    def losses(_: int) -> Iterator[Iterator[Tensor]]:
        count = 0
        for batch in batches(model, forget, "forget", reads):
            samples = reads.samples(batch)
            position = torch.arange(count, count + samples)
            yield terms(batch, position if ids is None else ids(batch))
            count += samples

    return descend(model, losses, **{**USUAL, **settings})


def forget_by_token(
    model: nn.Module, weigh: Callable[[Tensor], Tensor], *, task: Task | None, **settings: Any
) -> nn.Module:
    """``forget_and_retain`` on tokens weighted by ``weigh(losses [tokens])``."""
    reads = task_or_classification(task)
    reads.needs("units")

    def forget_loss(batch: Any, ids: Tensor) -> Tensor:
        losses = reads.units_by(model, batch).losses
        return ascent(weigh(losses), losses)

    return forget_and_retain(model, forget_loss, task=reads, **settings)


def sums(units: Units) -> Tensor:
    """Each sample's loss [samples], summed over its units."""
    return units.losses.new_zeros(len(units.lengths)).index_add(0, units.sample, units.losses)


def ascent(weights: Tensor, losses: Tensor) -> Tensor:
    """What is descended to forget [units] by detached weights: minus their weighted mean []."""
    return -(weights * losses).sum() / max(1, len(losses))


class SumTask(Task):
    """The same batches, a sample's loss being the sum over its units: -log p of a sequence."""

    def __init__(self, task: Task) -> None:
        task.needs("units")
        self.task = task

    def prepare(self, batch: Any, device: torch.device, name: str = "loader") -> Any:
        """As the task."""
        return self.task.prepare(batch, device, name)

    def samples(self, batch: Any) -> int:
        """As the task."""
        return self.task.samples(batch)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Sums over the units [samples]."""
        return sums(self.task.units_by(model, batch))

    def state_dict(self) -> dict[str, Any]:
        """As the task."""
        return self.task.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the task."""
        self.task.load_state_dict(state)


def references(
    model: nn.Module,
    forget: Loader,
    task: Task,
    ids: Ids | None,
    reference: ReferenceLosses | None,
) -> ReferenceLosses:
    """-log p of each forget sequence by the model as it is: given, or measured now."""
    if reference is None:
        return reference_losses(model, forget, task=SumTask(task), ids=ids)
    good = isinstance(reference, ReferenceLosses)
    found = type(reference).__name__
    require(good, "reference", "what reference_losses returned", found)
    reference.check(model)
    return reference
