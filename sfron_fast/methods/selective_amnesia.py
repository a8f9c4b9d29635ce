"""SA (Heng and Soh, NeurIPS 2023): replay of the retain set, a surrogate on the forget set, and the
elastic penalty of a Fisher that is estimated once. Published for generative models
(``task=Denoising(instead=Surrogate())``); the authors have no defaults for classifiers.

Changes the model in place and returns it. Further keywords go to ``descend`` (optimizer, momentum,
weight_decay, max_norm, on_epoch).
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import model_device
from ..data.endless import EndlessLoader
from ..errors import by_keyword, number
from ..losses import soft_target_kl
from ..saliency.fisher import Estimator, estimate_fisher
from ..tasks import Task
from .descent import Loader, batches, descend, task_or_classification
from .elastic import Elastic


@by_keyword
def selective_amnesia(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    penalty: float = 10.0,
    estimator: Estimator = "sample",
    draws: int = 1,
    epochs: int = 10,
    lr: float = 0.01,
    **settings: Any,
) -> nn.Module:
    """SA: the surrogate learnt on the forget set, the retain set replayed, and elastic weights.

    The surrogate is noise under the forget condition for a denoising task with
    ``instead=Surrogate()`` (or what else it wants in its place), and the uniform prediction for
    classifiers. The penalty is penalty / 2 sum F (theta - theta_0)^2 with the retain set's diagonal
    Fisher at the start, which is never estimated again. F goes as the square of the loss: beside a
    mean over elements (``Denoising``'s reduction) a penalty is as many times larger as there are
    elements than beside their sum. Each step takes a retain and a forget batch.

    The authors' DDPM: ``Denoising(reduction="sum", drop=0.0)``, penalty 20 (they do not halve it),
    Adam with lr 1e-4, max_norm 1, samples of the model itself in place of the retain set. Their
    Fisher squares a sample's gradient after it is summed over all timesteps; here each of ``draws``
    timesteps is squared.
    """
    number("penalty", penalty, 0.0)
    task = task_or_classification(task)
    generative = task.has("replacement_losses")
    task.needs("replacement_losses" if generative else "logits")
    fisher = estimate_fisher(model, retain, task=task, estimator=estimator, draws=draws)
    anchor = Elastic(model, fisher, penalty)
    endless, device = EndlessLoader(forget, "forget"), model_device(model)

    def surrogate(batch: Any) -> Tensor:
        if generative:
            return task.checked(task.replacement_losses(model, batch), batch).mean()
        logits = task.logits(task.outputs(model, batch), batch)
        return soft_target_kl(logits, torch.zeros_like(logits))

    def losses(_: int) -> Any:
        for batch in batches(model, retain, "retain", task):
            kept = task.mean_loss(model, batch)
            gone = surrogate(endless.batch(task, device))
            yield kept + gone + anchor()

    return descend(model, losses, epochs=epochs, lr=lr, **settings)
