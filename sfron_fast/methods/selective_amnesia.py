"""SA (Heng and Soh, NeurIPS 2023): replay of the retain set, a surrogate on the forget set, and the
elastic penalty of a Fisher that is estimated once. The authors have no defaults for classifiers.

Changes the model in place and returns it. Further keywords go to ``descend`` (momentum,
weight_decay, max_norm, on_epoch).
"""

from typing import Any

import torch
from torch import nn

from ..data.batches import model_device
from ..data.endless import EndlessLoader
from ..errors import by_keyword, number
from ..losses import soft_target_kl
from ..saliency.fisher import Estimator, estimate_fisher
from ..tasks import Task
from .descent import Loader, batches, descend, task_or_classification


@by_keyword
def selective_amnesia(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    penalty: float = 10.0,
    estimator: Estimator = "sample",
    epochs: int = 10,
    lr: float = 0.01,
    **settings: Any,
) -> nn.Module:
    """SA, for classifiers: uniform predictions on the forget set, the retain set replayed, and
    elastic weights.

    The penalty is penalty / 2 sum F (theta - theta_0)^2 with the retain set's diagonal Fisher at
    the start, which is never estimated again. Each step takes a retain and a forget batch.
    Published for generative models (Heng and Soh, NeurIPS 2023), where a sample of noise is what
    the uniform prediction is here.
    """
    number("penalty", penalty, 0.0)
    task = task_or_classification(task)
    task.needs("logits")
    fisher = estimate_fisher(model, retain, task=task, estimator=estimator)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    endless, device = EndlessLoader(forget, "forget"), model_device(model)

    def losses(_: int) -> Any:
        for batch in batches(model, retain, "retain", task):
            kept = task.mean_loss(model, batch)
            forgotten = endless.batch(task, device)
            logits = task.logits(task.outputs(model, forgotten), forgotten)
            gone = soft_target_kl(logits, torch.zeros_like(logits))
            named = dict(model.named_parameters())
            anchor = torch.stack(
                [(fisher[n] * (named[n] - w).square()).sum() for n, w in start.items()]
            ).sum()
            yield kept + gone + 0.5 * penalty * anchor

    return descend(model, losses, epochs=epochs, lr=lr, **settings)
