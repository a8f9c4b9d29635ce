"""BT (Chundawat et al., AAAI 2023): KL to an incompetent teacher where a sample is forgotten, and
to the original where it is kept.

Changes the model in place and returns it. Defaults are those of the authors' code for CIFAR-10 and
ResNet-18. Further keywords go to ``descend`` (momentum, weight_decay, max_norm, on_epoch).
"""

import copy
from typing import Any

import torch
from torch import nn

from ..errors import require
from ..losses import soft_target_kl
from ..tasks import Task
from .descent import Loader, batches, descend, task_or_classification, teach


def bad_teacher(
    model: nn.Module,
    mixed: Loader,
    incompetent: nn.Module,
    *,
    task: Task | None = None,
    temperature: float = 1.0,
    epochs: int = 10,
    lr: float = 0.02,
    **settings: Any,
) -> nn.Module:
    """BT: match the ``incompetent`` (untrained) model on the forget set and the original on the
    retain set.

    The loss is the mean of p log(p / q) over samples and classes, as the authors' code takes it.

    ``mixed``: batches (inputs, forgotten) of both sets, shuffled together; ``forgotten`` is bool
    [samples], what ``task.targets`` reads.
    """
    task = task_or_classification(task)
    task.needs("targets", "logits")
    competent = copy.deepcopy(model)

    def losses(_: int) -> Any:
        for batch in batches(model, mixed, "mixed", task):
            forgotten = task.targets(batch)
            expected = "bool targets: forgotten or not"
            require(forgotten.dtype == torch.bool, "mixed", expected, forgotten.dtype)
            good, bad = teach(competent, batch, task), teach(incompetent, batch, task)
            logits = task.logits(task.outputs(model, batch), batch)
            found = list(forgotten.shape)
            require(found == [len(logits)], "mixed", f"bool targets [{len(logits)}]", found)
            weights = torch.full((len(logits),), 1.0 / logits.numel(), device=logits.device)
            wanted = torch.where(forgotten[:, None], bad, good)
            yield soft_target_kl(logits, wanted, weights, temperature)

    return descend(model, losses, epochs=epochs, lr=lr, **settings)
