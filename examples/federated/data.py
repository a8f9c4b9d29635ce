"""Images of at most 14 pixels a side, and which of them are trained on."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..systems.images import load as load_images

TESTED = 0.2  # of all images
LARGEST = 14  # pixels a side


def load(path: Path | None) -> tuple[Tensor, Tensor]:
    """Images [n, 1, side, side] in [0, 1], of at most 14 pixels a side, and labels int64 [n]."""
    images, labels = load_images(path)
    shrink = -(-images.shape[-1] // LARGEST)
    return (F.avg_pool2d(images, shrink) if shrink > 1 else images), labels


def split(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which of ``count`` images are trained on and which tested, drawn by ``seed``."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 + seed))
    return order[round(TESTED * count) :], order[: round(TESTED * count)]
