"""scikit-learn's digits as images, and a judge that has never seen a generated one."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
NULL = CLASSES  # the class that stands for none
SHAPE = (1, 8, 8)
CHOSEN = (1, 2, 4, 6, 7)  # classes that settings were chosen on
TESTED = (0, 3, 5, 8, 9)  # classes that figures are reported on


class Digits(NamedTuple):
    """Images [count, channels, side, side] in [-1, 1] and their classes; not of digits alone."""

    images: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor

    def of(self, label: int, same: bool = True) -> tuple[Tensor, Tensor]:
        """Training images of a class, or of all others."""
        chosen = (self.labels == label) == same
        return self.images[chosen], self.labels[chosen]


def load() -> Digits:
    """Four fifths to train on, one to compare with; the same ones always."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).div(8.0).sub(1.0).view(-1, *SHAPE)
    labels = torch.tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, kept = order[: len(order) // 5], order[len(order) // 5 :]
    return Digits(images[kept], labels[kept], images[held], labels[held])


class Judge(nn.Module):
    """A small convolutional classifier; ``features`` [images, 32] are what it decides by, in units
    of their spread over the images it was trained on: distances have no scale of a judge's own.
    """

    def __init__(self, classes: int = CLASSES, shape: tuple[int, int, int] = SHAPE) -> None:
        super().__init__()
        self.shape = shape
        channels, height, width = shape
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * -(-height // 2) * -(-width // 2), 32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, classes)
        self.register_buffer("unit", torch.ones(()))  # root of a feature's mean variance

    def features(self, images: Tensor) -> Tensor:
        """Before the last layer."""
        return self.body(images.reshape(-1, *self.shape)) / self.unit

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.unit * self.features(images))


def train_judge(data: Digits, epochs: int = 40, classes: int = CLASSES) -> Judge:
    """On the training images."""
    torch.manual_seed(100)
    judge = Judge(classes, tuple(data.images.shape[1:]))
    adam = torch.optim.Adam(judge.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.labels)).split(64):
            adam.zero_grad()
            F.cross_entropy(judge(data.images[rows]), data.labels[rows]).backward()
            adam.step()
    with torch.no_grad():
        judge.unit.copy_(judge.features(data.images).var(0).mean().sqrt())
    return judge.eval()
