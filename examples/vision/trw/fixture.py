"""What is learnt, by which model, and what it says of a class."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.systems.training import fit
from sfron_fast.evaluation import Predictions, predict

CLASSES, WIDTH, BATCH, LR = 10, 256, 64, 3e-3
HELD_OUT = 2000  # images to test on, at most


@dataclass(frozen=True, eq=False)
class Data:
    """One draw: some to train on, others to test on."""

    train: TensorDataset
    test: TensorDataset

    def of(self, label: int, same: bool = True) -> TensorDataset:
        """Training samples of a class, or of all others."""
        images, labels = self.train.tensors
        chosen = (labels == label) == same
        return TensorDataset(images[chosen], labels[chosen])


def draw(images: Tensor, labels: Tensor, size: int, seed: int) -> Data:
    """``size`` to train on, and ``HELD_OUT`` of the rest."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = (order[:size], order[size:][:HELD_OUT])
    return Data(*(TensorDataset(images[at], labels[at]) for at in parts))


def shuffled(*tensors: Tensor) -> DataLoader:
    """Training batches."""
    return DataLoader(TensorDataset(*tensors), BATCH, shuffle=True)


def trained(data: TensorDataset, epochs: int, seed: int) -> nn.Sequential:
    """A perceptron with one hidden layer, learnt from new weights."""
    torch.manual_seed(seed)
    pixels, head = data.tensors[0][0].numel(), nn.Linear(WIDTH, CLASSES)
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, WIDTH), nn.ReLU(), head)
    batches = shuffled(*data.tensors)
    fit(model, batches, epochs, LR, loss=lambda b: F.cross_entropy(model(b[0]), b[1]))
    return model


def said(model: nn.Module, data: TensorDataset) -> Predictions:
    """What a model says; of its body, what the last layer reads."""
    return predict(model, DataLoader(data, 1000))


def mean_output(p: Predictions, label: int) -> Tensor:
    """Mean probabilities of a class's samples, fp64 [classes]."""
    return p.logits[p.labels == label].double().softmax(1).mean(0)


def variation(one: Tensor, other: Tensor) -> float:
    """Total variation distance of two distributions."""
    return float((one - other).abs().sum()) / 2


def accuracy_of(p: Predictions, label: int, same: bool = True) -> float:
    """On a class's samples, or on all others', in [0, 1]."""
    chosen = (p.labels == label) == same
    return float((p.logits.argmax(1) == p.labels)[chosen].double().mean())
