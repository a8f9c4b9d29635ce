"""A small classifier forgets one class of CIFAR-10; run it from the project's root:

    python -m examples.cifar10.forget_class [--data cifar-10-batches-py]

Without `--data` on synthetic images of CIFAR-10's form, in a few seconds. Prints accuracies in
percent before and after; a model that never saw the class has 0 on it.
"""

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sfron_fast as sf

CLASSES = 10
BATCH = 50  # of forget and retain set alike: the Fisher of batch means depends on it


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of the python archive; none = synthetic")
    parser.add_argument("--forget-class", type=int, default=3, choices=range(CLASSES))
    parser.add_argument("--epochs", type=int, default=6, help="of the training before")
    parser.add_argument("--cycles", type=int, default=10, help="of unlearning")
    parser.add_argument("--max-norm", type=float, default=2.0, help="clip of the forget gradient")
    return parser.parse_args(arguments)


def synthetic(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images fp32 [samples, 3, 32, 32], noise around one coarse pattern a class; labels int64."""
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    patterns = F.interpolate(patterns, size=(32, 32))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    return patterns[labels] + torch.randn(samples, 3, 32, 32, generator=generator), labels


def cifar10(folder: Path, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Images fp32 [n, 3, 32, 32] of about unit variance and labels int64 [n] of the named files."""
    images, labels = [], []
    for name in names:
        with (folder / name).open("rb") as file:
            part = pickle.load(file, encoding="bytes")
        images.append(torch.from_numpy(part[b"data"]).view(-1, 3, 32, 32))
        labels.append(torch.tensor(part[b"labels"]))
    return (torch.cat(images).float() - 125.0) / 64.0, torch.cat(labels)


def load(folder: Path | None) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and held-out images with their labels."""
    if folder is None:
        return synthetic(500, seed=1), synthetic(200, seed=2)
    training = [f"data_batch_{number}" for number in range(1, 6)]
    return cifar10(folder, training), cifar10(folder, ["test_batch"])


def make_model(width: int = 8) -> nn.Module:
    """Logits [batch, 10] of images [batch, 3, 32, 32]."""
    layers: list[nn.Module] = []
    before = 3
    for after in (width, 2 * width, 4 * width):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))


def train(model: nn.Module, batches: DataLoader, epochs: int, device: torch.device) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()


def accuracies(
    model: nn.Module, sets: dict[str, TensorDataset], device: torch.device
) -> dict[str, float]:
    """In percent, by name of the set."""
    model.eval()
    found = {}
    for name, part in sets.items():
        right = 0
        for x, y in DataLoader(part, 500):
            with torch.no_grad():
                right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
        found[name] = 100.0 * right / len(part)
    model.train()
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Accuracies before and after, by set."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    (x, y), (held_x, held_y) = load(options.data)
    gone, held_gone = y == options.forget_class, held_y == options.forget_class
    sets = {
        "forget": TensorDataset(x[gone], y[gone]),
        "retain": TensorDataset(x[~gone], y[~gone]),
        "holdout": TensorDataset(held_x[~held_gone], held_y[~held_gone]),
    }
    model = make_model().to(device)
    train(model, DataLoader(TensorDataset(x, y), BATCH, shuffle=True), options.epochs, device)
    before = accuracies(model, sets, device)

    loaders = {name: DataLoader(part, BATCH, shuffle=True) for name, part in sets.items()}
    recipe = sf.Recipe.official(cycles=options.cycles, max_norm=options.max_norm)
    sf.unlearn(
        model,
        forget=loaders["forget"],
        retain=loaders["retain"],
        holdout=loaders["holdout"],
        recipe=recipe,
        eval_every=5,
        forget_floor=0.0,  # a whole class goes: there is no accuracy to keep
    )
    after = accuracies(model, sets, device)
    for name in sets:
        print(f"{name:>8}: {before[name]:5.1f} % -> {after[name]:5.1f} %")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
