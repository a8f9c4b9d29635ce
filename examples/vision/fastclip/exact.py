"""Norms from autograd beside those of the matrices themselves."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sfron_fast import methods

Compared = dict[str, dict[str, Any]]


def layers(seed: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Of several kinds, untrained, each with an input; a BatchNorm that has seen something."""
    torch.manual_seed(seed)
    after = [nn.BatchNorm2d(16), nn.BatchNorm2d(16), nn.BatchNorm1d(40)]
    with torch.no_grad():
        for norm in after:
            norm.running_var.uniform_(0.2, 2.0)
            norm.weight.uniform_(0.5, 2.0)
            norm.running_mean.normal_()
    conv, image = nn.Conv2d, torch.zeros(1, 3, 16, 16)
    return {
        "3x3, padding 1": (conv(3, 32, 3, padding=1), image),
        "3x3, stride 2, padding 1": (conv(3, 32, 3, stride=2, padding=1), image),
        "5x5, stride 2, padding 2": (conv(3, 32, 5, stride=2, padding=2), image),
        "5x5, no padding": (conv(3, 16, 5), image),
        "linear": (nn.Linear(256, 64), torch.zeros(1, 256)),
        "3x3 and BatchNorm": (nn.Sequential(conv(3, 16, 3, padding=1), after[0]), image),
        "strided and BatchNorm": (nn.Sequential(conv(3, 16, 3, 2, 1), after[1]), image),
        "linear and BatchNorm": (nn.Sequential(nn.Linear(100, 40), after[2]), torch.zeros(1, 100)),
    }


@torch.no_grad()
def dense_norm(run: nn.Module, like: Tensor) -> float:
    """The norm of M in fp64, which is made by running every unit vector through the layer."""
    size = like[0].numel()
    unit = torch.eye(size, dtype=torch.float64).reshape(size, *like.shape[1:])
    run = run.double().eval()
    m = (run(unit) - run(torch.zeros_like(unit[:1]))).flatten(1)
    return float(torch.linalg.eigvalsh(m @ m.T)[-1].clamp_min(0.0).sqrt())


def in_order(model: nn.Sequential, image: Tensor) -> dict[str, tuple[nn.Module, Tensor]]:
    """The layers of a network that have weights, each with its input."""
    found, x = {}, image
    for name, layer in model.named_children():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            found[f"trained {name}"] = (layer, x)
        x = layer(x)
    return found


def compared(found: Mapping[str, tuple[nn.Module, Tensor]], share: float) -> Compared:
    """Of each layer its norm, that of the matrix, that of the kernel reshaped to one (of a layer
    alone), and that of the matrix once it has been clipped to ``share`` of its norm, over that.
    """
    rows: Compared = {}
    for name, (layer, like) in found.items():
        layer = copy.deepcopy(layer).eval()
        norm = next(iter(methods.spectral_norms(layer, like).values()))
        exact = dense_norm(copy.deepcopy(layer), like)
        row = {"norm": norm, "exact": exact, "error": abs(norm / exact - 1.0)}
        if isinstance(layer, nn.Conv2d):
            row["reshaped"] = float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2))
        methods.clip_spectral_norms(layer, like, bound=share * exact)
        row["clipped, by the bound"] = dense_norm(layer, like) / (share * exact)
        rows[name] = row
    return rows
