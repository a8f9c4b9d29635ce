"""Two denoisers of 8 x 8 images with classes: a residual MLP and a small UNet."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .digits import CLASSES, SHAPE

STEPS = 1000
KEPT = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64).neg().add(1.0).cumprod(0)


def wave(t: Tensor, width: int) -> Tensor:
    """Sines and cosines of a timestep [samples, width]."""
    rates = torch.exp(torch.arange(width // 2, device=t.device) * (-math.log(1e4) / (width // 2)))
    angles = t.float().unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class Given(nn.Module):
    """What a block is told: timestep and class [samples, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(CLASSES + 1, width)

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        return self.time(wave(t, self.width)) + self.label(labels)


class Mlp(nn.Module):
    """Residual blocks on the flat image."""

    def __init__(self, width: int = 192, blocks: int = 3) -> None:
        super().__init__()
        size = math.prod(SHAPE)
        self.given, self.first = Given(width), nn.Linear(size, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.wide = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.back = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.last = nn.Linear(width, size)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        given, hidden = self.given(t, class_labels), self.first(x.flatten(1))
        for norm, wide, back in zip(self.norms, self.wide, self.back, strict=True):
            hidden = hidden + back(F.silu(wide(norm(hidden) + given)))
        return self.last(hidden).view_as(x)


class Block(nn.Module):
    """Two convolutions around what is given."""

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.given = nn.Linear(width, outputs)
        self.norm = nn.GroupNorm(4, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        hidden = F.silu(self.norm(self.first(x))) + self.given(given)[:, :, None, None]
        return self.skip(x) + self.second(F.silu(hidden))


class UNet(nn.Module):
    """8 x 8, 4 x 4 and back."""

    def __init__(self, channels: int = 24, width: int = 64) -> None:
        super().__init__()
        self.given = Given(width)
        self.first = Block(1, channels, width)
        self.down = nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2)
        self.middle = Block(2 * channels, 2 * channels, width)
        self.up = nn.Conv2d(2 * channels, channels, 1)
        self.last = Block(2 * channels, channels, width)
        self.out = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        given = self.given(t, class_labels)
        fine = self.first(x, given)
        coarse = self.middle(self.down(fine), given)
        back = F.interpolate(self.up(coarse), scale_factor=2.0, mode="nearest")
        return self.out(self.last(torch.cat([fine, back], 1), given))


MODELS = {"mlp": (Mlp, 4000, 1e-3), "unet": (UNet, 2500, 2e-3)}  # model, steps and lr of training
