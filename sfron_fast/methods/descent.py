"""The loop all baselines share: epochs of steps, one for each loss that a method yields."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..data.batches import check_again, model_device
from ..errors import number, require, warn
from ..models.modes import evaluating, keeping_modes, recording, set_modes, training_modes
from ..saliency.mask import SaliencyMask
from ..tasks import Classification, Task
from ..tasks.task import as_task, check_depends

Loader = Iterable[Any]  # of batches that the task reads; read once an epoch
# epoch 0, 1, ... -> the loss of each step; or its terms, made one at a time, when the graph of the
# one before is gone
Losses = Callable[[int], Iterator[Tensor | Iterator[Tensor]]]


def descend(
    model: nn.Module,
    losses: Losses,
    *,
    epochs: int,
    lr: float,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float | None = None,
    weight_decay: float = 5e-4,
    cosine: bool = True,
    training: bool = True,
    max_norm: float | None = None,
    mask: SaliencyMask | None = None,
    on_epoch: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Descent on ``losses``, in place; every module's own training flag is restored after.

    Args:
        optimizer: torch's SGD or AdamW.
        momentum: of SGD, None = 0.9.
        cosine: lr falls to 0 on a cosine over the epochs, else it stays.
        training: whether its steps run in training mode, as those of ``unlearn`` (a submodule put
            to eval() stays so), or in eval mode as a whole.
        max_norm: clip of each step's gradient, None = none.
        mask: weights outside it keep their bits; a clip sees the gradients inside.
        on_epoch: called as ``on_epoch(epoch, model)`` after every epoch, the first being 1.

    Raises:
        ValueError: a setting out of range, by name; a mask of another model.
    """
    require(isinstance(epochs, int) and epochs > 0, "epochs", "an integer > 0", repr(epochs))
    number("lr", lr, 0.0)
    if max_norm is not None:
        number("max_norm", max_norm, 0.0, open_low=True)
    params = [p for p in model.parameters() if p.requires_grad]
    frozen = [] if mask is None else _frozen(model, mask)
    engine = _optimizer(optimizer, params, lr, momentum, weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(engine, T_max=epochs)
    modes = training_modes(model)
    with keeping_modes(model), recording(model):
        for epoch in range(epochs):
            if training:
                set_modes(model, modes)
            else:
                model.eval()
            finite = []
            for step in losses(epoch):
                engine.zero_grad()
                for loss in (step,) if isinstance(step, Tensor) else step:
                    finite.append(torch.isfinite(loss.detach()))
                    loss.backward()
                for p, outside, _ in frozen:
                    if p.grad is not None:
                        p.grad.masked_fill_(outside, 0.0)
                if max_norm is not None:
                    torch.nn.utils.clip_grad_norm_(params, max_norm)
                engine.step()
                with torch.no_grad():  # weight decay moves what has no gradient
                    for p, outside, start in frozen:
                        p.copy_(torch.where(outside, start, p))
            # once an epoch, as the answer waits for the device
            if finite and not bool(torch.stack(finite).all()):
                warn(
                    f"the loss was not finite in epoch {epoch + 1}, and the weights are lost;"
                    " lower lr, or look for NaN in the data"
                )
            if cosine:
                schedule.step()
            if on_epoch is not None:
                on_epoch(epoch + 1, model)
    return model


def _optimizer(
    kind: str, params: list[nn.Parameter], lr: float, momentum: float | None, weight_decay: float
) -> torch.optim.Optimizer:
    require(kind in ("sgd", "adamw"), "optimizer", "'sgd' or 'adamw'", repr(kind))
    if kind == "sgd":
        momentum = 0.9 if momentum is None else momentum
        return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    require(momentum is None, "momentum", "None with 'adamw'", momentum)
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)


def _frozen(model: nn.Module, mask: SaliencyMask) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
    """Each trainable parameter, what of it lies outside the mask (bool), and its values now."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    mask.resolve(named)  # raises for another model's mask
    return [(p, ~mask.to_bool(n).to(p.device), p.detach().clone()) for n, p in named]


def task_or_classification(task: Task | None) -> Task:
    """What every method does without a task: classification."""
    return as_task(task, Classification)


def batches(model: nn.Module, loader: Loader, name: str, task: Task) -> Iterator[Any]:
    """The batches that have samples, prepared by the task for the model's device.

    Raises:
        ValueError: there are none, or they can be read once: the next epoch would find none.
    """
    check_again(loader, name)
    empty = True
    for batch in task.prepared(loader, model_device(model), name):
        yield batch
        empty = False
    remedy = "check the split and drop_last"
    require(not empty, name, "at least one batch", "an empty loader", remedy)


def mean_losses(
    model: nn.Module, loader: Loader, name: str, task: Task, sign: float = 1.0
) -> Callable[[int], Iterator[Tensor]]:
    """The mean loss of each batch of ``loader``, every epoch; times ``sign``."""
    check_again(loader, name)

    def losses(_: int) -> Iterator[Tensor]:
        for batch in batches(model, loader, name, task):
            loss = task.mean_loss(model, batch)
            check_depends(loss, task)
            yield sign * loss

    return losses


def teach(teacher: nn.Module, batch: Any, task: Task) -> Tensor:
    """A teacher's logits [units, classes], in eval mode and without gradients."""
    with evaluating(teacher), torch.no_grad():
        return task.logits(task.outputs(teacher, batch), batch)
