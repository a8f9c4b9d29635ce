"""NPO (Zhang et al., COLM 2024, arXiv 2404.05868): preferences with negative examples only.

    loss = -2 / beta log sigmoid(-beta log(p / p_ref))

the mean over forget sequences; + retain_weight * mean l(retain). Changes the model in place and
returns it. Defaults are open-unlearning's; further keywords go to ``descend`` (weight_decay,
max_norm, on_epoch).
"""

from typing import Any

from torch import Tensor, nn

from ..errors import by_keyword
from ..evaluation.reference_losses import ReferenceLosses
from ..tasks import Task
from ..weights import npo_weights
from .descent import Loader, task_or_classification
from .weighted import Ids, ascent, forget_and_retain, references, sums


@by_keyword
def npo(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    beta: float = 0.1,
    ids: Ids | None = None,
    reference: ReferenceLosses | None = None,
    retain_weight: float = 1.0,
    epochs: int = 10,
    lr: float = 1e-5,
    **settings: Any,
) -> nn.Module:
    """NPO: a sequence weighs less the less likely it is than it was.

    Args:
        ids: of a prepared batch the numbers of its samples, int64 [samples]; None = positions, for
            a forget loader that does not shuffle.
        reference: ``reference_losses`` of the forget set by this model, as sums; None = measured
            now, in one pass.
    """
    task = task_or_classification(task)
    task.needs("units")
    known = references(model, forget, task, ids, reference)

    def forget_loss(batch: Any, samples: Tensor) -> Tensor:
        losses = sums(task.units_by(model, batch))
        return ascent(npo_weights(losses, known[samples].to(losses), beta), losses)

    return forget_and_retain(
        model,
        forget_loss,
        forget=forget,
        retain=retain,
        retain_weight=retain_weight,
        ids=ids,
        task=task,
        epochs=epochs,
        lr=lr,
        **settings,
    )
