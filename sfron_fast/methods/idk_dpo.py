"""IdkDPO (Zhang et al., COLM 2024, as TOFU runs it): DPO (arXiv 2305.18290) with "I do not know" as
the preferred answer.

    loss = -2 / beta log sigmoid(beta (log(p / p_ref) of the answer "I do not know"
                                       - log(p / p_ref) of the answer to forget))

the mean over pairs; + retain_weight * mean l(retain). Changes the model in place and returns it.
Defaults are open-unlearning's; further keywords go to ``descend`` (weight_decay, max_norm,
on_epoch).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import by_keyword, require
from ..evaluation.reference_losses import reference_losses
from ..tasks import Task
from ..weights import dpo_weights
from .descent import Loader, task_or_classification
from .weighted import SumTask, forget_and_retain


@by_keyword
def idk_dpo(
    model: nn.Module,
    *,
    pairs: Loader,
    retain: Loader,
    task: Task | None = None,
    beta: float = 0.1,
    retain_weight: float = 1.0,
    epochs: int = 10,
    lr: float = 1e-5,
    **settings: Any,
) -> nn.Module:
    """IdkDPO: the preferred answer becomes likelier and the other one less likely.

    Args:
        pairs: batches ``(preferred, forget)`` of two answers to the same questions, each a batch of
            the task with as many samples; in the same order in every pass, as what the model said
            before is kept by position.

    Raises:
        ValueError: no such pair, a loader that shuffles, or a setting out of range.
    """
    task = task_or_classification(task)
    sequences, both = SumTask(task), _Pairs(task)
    before = [reference_losses(model, pairs, task=_Half(task, half)) for half in (0, 1)]

    def forget_loss(batch: Any, samples: Tensor) -> Tensor:
        preferred, forgotten = (sequences.losses(model, half) for half in batch)
        first, second = (known[samples].to(preferred) for known in before)
        weights = (2.0 / beta) * dpo_weights(preferred, forgotten, first, second, beta)
        return (weights * (preferred - forgotten)).mean()

    return forget_and_retain(
        model,
        forget_loss,
        forget=pairs,
        retain=retain,
        retain_weight=retain_weight,
        task=task,
        forget_task=both,
        epochs=epochs,
        lr=lr,
        **settings,
    )


class _Pairs(Task):
    """Batches (preferred, forget), each one of the task's."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def prepare(self, batch: Any, device: torch.device, name: str = "loader") -> Any:
        """Both halves prepared; whoever reads them, they are the argument ``pairs``."""
        name = "pairs"
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        require(pair, name, "pairs (preferred, forget) of batches", type(batch).__name__)
        halves = [self.task.prepare(half, device, name) for half in batch]
        sizes = [self.task.samples(half) for half in halves]
        require(sizes[0] == sizes[1], name, "as many samples in both halves of a pair", sizes)
        return tuple(halves)

    def samples(self, batch: Any) -> int:
        """Pairs."""
        return self.task.samples(batch[0])


class _Half(SumTask):
    """One half of each pair."""

    def __init__(self, task: Task, half: int) -> None:
        super().__init__(task)
        self.half = half

    def prepare(self, batch: Any, device: torch.device, name: str = "loader") -> Any:
        """That half, prepared."""
        return _Pairs(self.task).prepare(batch, device, name)[self.half]
