"""What is learnt and forgotten, by which model, and how far one model is from another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.systems.training import fit
from sfron_fast.evaluation import accuracy, per_sample_loss, predict
from sfron_fast.evaluation.language import auc

CLASSES = 10
MEASURES = ("unlearn", "retain", "test", "AUC")  # accuracies, and the membership attack

Measured = Mapping[str, float]


@dataclass(frozen=True)
class Split:
    """One draw: what was trained on, in two parts, and all the rest to test on."""

    forget: TensorDataset
    retain: TensorDataset
    train: TensorDataset
    test: TensorDataset


def split(images: Tensor, labels: Tensor, size: int, forgotten: int, seed: int) -> Split:
    """``size`` to train on, of which the first ``forgotten`` go."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    places = (order[:forgotten], order[forgotten:size], order[:size], order[size:])
    return Split(*(TensorDataset(images[at], labels[at]) for at in places))


def shuffled(data: TensorDataset, batch: int) -> DataLoader:
    """Training batches."""
    return DataLoader(data, batch, shuffle=True)


class Passes:
    """Batches, with something done before each pass."""

    def __init__(self, batches: DataLoader, act: Callable[[], Any]) -> None:
        self.batches, self.act = batches, act

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        self.act()
        return iter(self.batches)


def trained(
    make: Callable[[], nn.Module],
    data: TensorDataset,
    *,
    seed: int,
    epochs: int,
    lr: float,
    batch: int,
    keep: Callable[[nn.Module], Any] = lambda model: None,
) -> nn.Module:
    """A new model that knows its training set; ``keep`` is called before each pass and at the end,
    as a bound on the weights is.
    """
    torch.manual_seed(seed)
    model = make()
    fit(
        model,
        Passes(shuffled(data, batch), partial(keep, model)),
        epochs,
        lr,
        loss=lambda both: F.cross_entropy(model(both[0]), both[1]),
    )
    keep(model)
    return model


def measured(model: nn.Module, parts: Split) -> Measured:
    """Accuracies in [0, 1], and how well a sample's loss tells forget from test samples."""
    found = [predict(model, DataLoader(d, 1000)) for d in (parts.forget, parts.retain, parts.test)]
    forget, _, test = found
    values = [accuracy(p) / 100.0 for p in found]
    values.append(auc(-per_sample_loss(forget), -per_sample_loss(test)))
    return dict(zip(MEASURES, values, strict=True))


def mean(found: Sequence[Measured]) -> Measured:
    """Over repeats."""
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}


def gap(found: Measured, reference: Measured) -> float:
    """Mean distance of the four measures."""
    return sum(abs(found[name] - reference[name]) for name in MEASURES) / len(MEASURES)
