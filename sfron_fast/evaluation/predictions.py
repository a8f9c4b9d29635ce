"""What a model says about a data set, and how often it is right."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import call, check_loader, model_device, move
from ..distributed.ranks import Ranks
from ..errors import by_keyword, require
from ..models.modes import evaluating
from ..tasks import Task
from ..tasks.classification import check_logits

Loader = Iterable[Any]  # of batches (inputs, labels); read twice when the reference is a model


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says about one data set.

    `logits` float32 on the CPU [n, classes]; `labels` int64 on the CPU [n]; `input_sums` float64
    [n] or None: each input's sum (NaN: unknown), by which `kl_divergence` notices that two models
    saw different samples. Raises ValueError for other shapes or types, non-finite logits, labels
    outside [0, classes).
    """

    logits: Tensor
    labels: Tensor
    input_sums: Tensor | None = None

    def __post_init__(self) -> None:
        check_logits(self.logits, self.labels, "Predictions")
        found = [(t.dtype, t.device.type) for t in (self.logits, self.labels)]
        expected = [(torch.float32, "cpu"), (torch.int64, "cpu")]
        require(
            found == expected,
            "Predictions",
            f"{expected}",
            found,
            "use .float(), .long() and .cpu()",
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Evaluated:
    """One model's predictions on the three sets.

    Keep the reference's: it then runs once for all methods.
    """

    forget: Predictions
    retain: Predictions
    holdout: Predictions


def predict(model: nn.Module, loader: Loader) -> Predictions:
    """Run `model` on its own device, in eval mode without gradients, over batches (inputs, labels).

    Inputs are what `unlearn` takes: tensors or nests of them; a mapping is unpacked,
    `model(**inputs)`. Batches without samples are skipped. A logit may be -inf: its class is
    switched off.

    Every submodule's training flag is put back, also after an error. Raises ValueError for an empty
    loader, labels outside [0, classes), and logits that are not finite floats [batch, classes].
    """
    return predict_named(model, loader, "loader")


def predict_named(model: nn.Module, loader: Loader, name: str) -> Predictions:
    """`predict`, with errors about the loader called `name`."""
    device = model_device(model)
    check_loader(loader, name)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    with evaluating(model), torch.no_grad():
        for batch in loader:
            inputs, target = move(batch, device, name)
            if not len(target):
                continue
            output = call(model, inputs)
            check_logits(output, target, name)
            plain = (
                isinstance(inputs, Tensor)
                and not inputs.is_complex()
                and len(inputs) == len(target)
            )
            rows = (
                inputs.reshape(len(target), -1)
                if plain
                else torch.full((len(target), 1), torch.nan)
            )
            sums = rows.sum(1, dtype=torch.float64)
            parts.append((output.float().cpu(), target.long().cpu(), sums.cpu()))
    require(
        bool(parts),
        name,
        "at least one batch",
        "none",
        "pass a DataLoader or list, not a generator",
    )
    widths = sorted({logits.shape[1] for logits, _, _ in parts})
    require(
        len(widths) == 1,
        name,
        "the same classes in every batch",
        widths,
        "evaluate one head at a time",
    )
    return Predictions(*map(torch.cat, zip(*parts, strict=True)))


@by_keyword
def collect(model: nn.Module, *, forget: Loader, retain: Loader, holdout: Loader) -> Evaluated:
    """`predict` on the three sets. Use test-time transforms and shuffle=False.

    Raises as `predict` does.
    """
    loaders = {"forget": forget, "retain": retain, "holdout": holdout}
    return Evaluated(**{name: predict_named(model, data, name) for name, data in loaders.items()})


def accuracy(p: Predictions) -> float:
    """Top-1 accuracy in percent, 0 to 100."""
    return 100.0 * int((p.logits.argmax(1) == p.labels).sum()) / len(p.labels)


def task_accuracy(
    model: nn.Module, loader: Loader, name: str, task: Task, group: Any = None
) -> float:
    """Units that the model gets right, in percent, 0 to 100, over the batches of ``loader``; with a
    process group over those of all its ranks, the same on each.

    Raises ValueError for a loader without samples, and for a task that does not say what is right.
    """
    ranks = Ranks(model, group)
    model, rounds, counts = ranks.model, 0, torch.zeros(2, dtype=torch.int64)
    with evaluating(model), torch.no_grad():
        prepared = task.prepared(loader, ranks.device, name)
        for batch, samples in ranks.rounds((b, task.samples(b)) for b in prepared):
            rounds += 1
            with ranks.together(waiting=False):
                if batch is None:
                    continue
                right = task.correct(task.outputs(model, batch), batch, name)
                found = f"{right.dtype} {list(right.shape)}"
                good = right.dtype == torch.bool and right.dim() == 1
                require(good, task.argument, "bool [units] of correct()", found)
            if samples[ranks.rank]:
                counts += torch.stack([right.cpu().sum(), torch.tensor(len(right))])
    remedy = "pass a DataLoader or list, not a generator"
    require(rounds > 0, name, "at least one batch", "none", remedy)
    right, units = ranks.sum(counts).tolist()
    require(units > 0, name, "a label that counts", "none: all are left out")
    return 100.0 * right / units
