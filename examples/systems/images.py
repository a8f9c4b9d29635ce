"""Images that a demonstration of one seed learns: scikit-learn's digits, or a file's."""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfron_fast.demo.digits import load_digits

from .claims import parser


def options(description: str, out: Path) -> argparse.ArgumentParser:
    """Of a demonstration: which seed, where its results go, and which images it learns."""
    found = parser(description, out)
    told = "npz with images uint8 [n, height, width] and labels [n]; none = scikit-learn's digits"
    found.add_argument("--data", type=Path, help=told)
    return found


def load(path: Path | None) -> tuple[Tensor, Tensor]:
    """Images fp32 [n, 1, height, width] in [0, 1] and labels int64 [n]: scikit-learn's digits, or
    those of an npz with ``images`` uint8 [n, height, width] and ``labels`` [n].
    """
    if path is None:
        return load_digits()
    with np.load(path) as found:
        images, labels = torch.from_numpy(found["images"]), torch.from_numpy(found["labels"])
    return images.unsqueeze(1).float() / 255.0, labels.long()
