"""Images of digits: scikit-learn's, or a file's."""

import argparse
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from sfron_fast.demo.digits import load_digits

from ..systems.claims import parser

TESTED = 0.2  # of all images
LARGEST = 14  # pixels a side


def options(description: str, out: Path) -> argparse.ArgumentParser:
    """Of a demonstration: seed, folder, data."""
    found = parser(description, out)
    found.add_argument("--data", type=Path, help="npz with images [n, side, side] and labels [n]")
    return found


def load(path: Path | None) -> tuple[Tensor, Tensor]:
    """Images [n, 1, side, side] in [0, 1], of at most 14 pixels a side, and labels int64 [n]."""
    if path is None:
        return load_digits()
    with numpy.load(path) as file:
        images = torch.tensor(file["images"]).float().unsqueeze(1) / 255.0
        labels = torch.tensor(file["labels"]).long()
    shrink = -(-images.shape[-1] // LARGEST)
    return (F.avg_pool2d(images, shrink) if shrink > 1 else images), labels


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which of ``count`` images are trained on and which tested, drawn by ``seed``."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 + seed))
    return order[round(TESTED * count) :], order[: round(TESTED * count)]
