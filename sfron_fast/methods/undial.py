"""UNDIAL (Dong et al., NAACL 2025, arXiv 2402.10052): the model's own logits with the label's
lowered, as a teacher.

    loss = mean over forget tokens of the cross-entropy to softmax(z_0 - strength * onehot(label))

z_0 the logits before unlearning; + retain_weight * mean l(retain). Changes the model in place and
returns it. Defaults are open-unlearning's; further keywords go to ``descend`` (weight_decay,
max_norm, on_epoch). Departures: prompt and padding do not count (open-unlearning averages over
them); and the original's weights are kept, as the targets are whole distributions: once more the
memory of the trainable weights.
"""

from typing import Any

from torch import Tensor, nn

from ..errors import by_keyword, number
from ..losses import soft_target_kl
from ..tasks import Task
from .descent import Loader, task_or_classification, teach
from .original import Original
from .weighted import forget_and_retain


@by_keyword
def undial(
    model: nn.Module,
    *,
    forget: Loader,
    retain: Loader,
    task: Task | None = None,
    strength: float = 10.0,
    retain_weight: float = 0.0,
    epochs: int = 10,
    lr: float = 1e-4,
    **settings: Any,
) -> nn.Module:
    """UNDIAL: distillation from the model before, with the label's logit ``strength`` lower."""
    number("strength", strength, 0.0)
    task = task_or_classification(task)
    task.needs("logits", "unit_labels")
    original = Original(model)

    def forget_loss(batch: Any, ids: Tensor) -> Tensor:
        with original.weights(model):
            teacher = teach(model, batch, task).clone()
        outputs = task.outputs(model, batch)
        label = task.unit_labels(outputs, batch).unsqueeze(1)
        teacher.scatter_add_(1, label, teacher.new_full(label.shape, -strength))
        # the entropy of the target, by which the two differ, has no gradient
        return soft_target_kl(task.logits(outputs, batch), teacher)

    return forget_and_retain(
        model,
        forget_loss,
        forget=forget,
        retain=retain,
        retain_weight=retain_weight,
        task=task,
        epochs=epochs,
        lr=lr,
        **settings,
    )
