"""The demo's data and model: scikit-learn's bundled digits, a small ConvNet, and two things to
forget.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

FORGOTTEN_CLASS = 3
WRONG_SHARE = 0.1
BATCH = 64
SETTINGS = ("one class", "wrong labels")


@dataclass(frozen=True)
class Split:
    """One setting's data: what was trained on, split into forget and retain; validation; test."""

    forget: TensorDataset
    retain: TensorDataset
    train: TensorDataset
    val: TensorDataset
    test: TensorDataset


def small_convnet() -> nn.Module:
    """Three 3x3 convolutions with BatchNorm for 8x8 digits, about 58,000 weights."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]

    return nn.Sequential(
        *(*block(1, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 10)),
    )


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [0, 1] and labels [1797] of the digits in scikit-learn's wheel."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError(
            "the demo needs scikit-learn's digits: pip install sfron-fast[eval]"
        ) from error
    digits = bundled()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return images, torch.tensor(digits.target, dtype=torch.int64)


def make_split(setting: str, seed: int) -> Split:
    """Train 1,200, validation 250, test 347 digits, drawn by ``seed``, and the setting's forget
    set.
    """
    images, labels = load_digits()
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(labels), generator=generator)
    parts = dict(zip(("train", "val", "test"), order.split([1200, 250, 347]), strict=True))
    x = {name: images[index] for name, index in parts.items()}
    y = {name: labels[index] for name, index in parts.items()}
    if setting == "one class":
        forget = y["train"] == FORGOTTEN_CLASS
        for name in ("val", "test"):  # a model that never saw the class is judged on the others
            kept = y[name] != FORGOTTEN_CLASS
            x[name], y[name] = x[name][kept], y[name][kept]
    else:
        forget = torch.zeros(len(y["train"]), dtype=torch.bool)
        forget[: round(WRONG_SHARE * len(forget))] = True
        shift = torch.randint(1, 10, (int(forget.sum()),), generator=generator)
        y["train"][forget] = (y["train"][forget] + shift) % 10
    pairs = {name: TensorDataset(x[name], y[name]) for name in parts}
    chosen = {
        name: TensorDataset(x["train"][where], y["train"][where])
        for name, where in (("forget", forget), ("retain", ~forget))
    }
    return Split(**pairs, **chosen)


def shuffled(data: TensorDataset) -> DataLoader:
    """Training batches."""
    return DataLoader(data, batch_size=BATCH, shuffle=True)


def ordered(data: TensorDataset) -> DataLoader:
    """Evaluation batches."""
    return DataLoader(data, batch_size=512)


def train(data: TensorDataset, seed: int, epochs: int = 25) -> nn.Module:
    """The small ConvNet trained from scratch until it knows its training set by heart."""
    torch.manual_seed(seed)
    model = small_convnet()
    loader = shuffled(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
    return model
