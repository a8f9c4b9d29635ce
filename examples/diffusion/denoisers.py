"""Denoisers of small images with classes: a residual MLP, a UNet and a transformer."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .digits import CLASSES, SHAPE

STEPS = 1000
PATCH = 2
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
    """Halves the image ``levels - 1`` times, with twice the channels each time, and back."""

    def __init__(
        self, channels: int = 24, width: int = 64, image_channels: int = 1, levels: int = 2
    ) -> None:
        super().__init__()
        sizes = [channels << level for level in range(levels)]
        pairs = list(pairwise(sizes))
        self.given = Given(width)
        self.first = Block(image_channels, channels, width)
        self.down, self.coarse = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in pairs:
            self.down.append(nn.Conv2d(fine, coarse, 3, padding=1, stride=2))
            self.coarse.append(Block(coarse, coarse, width))
        self.up, self.fine = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in reversed(pairs):
            self.up.append(nn.Conv2d(coarse, fine, 1))
            self.fine.append(Block(2 * fine, fine, width))
        self.out = nn.Conv2d(channels, image_channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        given = self.given(t, class_labels)
        hidden, kept = self.first(x, given), []
        for down, coarse in zip(self.down, self.coarse, strict=True):
            kept.append(hidden)
            hidden = coarse(down(hidden), given)
        for up, fine in zip(self.up, self.fine, strict=True):
            back = F.interpolate(up(hidden), scale_factor=2.0, mode="nearest")
            hidden = fine(torch.cat([kept.pop(), back], 1), given)
        return self.out(hidden)


class Attended(nn.Module):
    """A transformer's layer whose norms are scaled and shifted by what is given (adaLN-Zero: its
    gates begin at 0, so that a fresh layer adds nothing).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attend, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.given = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.given.weight)
        nn.init.zeros_(self.given.bias)

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """[samples, places, width] and [samples, width] -> like x."""
        scale, shift, gate, wide_scale, wide_shift, wide_gate = (
            part.unsqueeze(1) for part in self.given(F.silu(given)).chunk(6, 1)
        )
        places = self.attend(self.norms[0](x) * (1.0 + scale) + shift)
        q, k, v = places.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.join(seen)
        hidden = self.norms[1](x) * (1.0 + wide_scale) + wide_shift
        return x + wide_gate * self.back(F.gelu(self.wide(hidden)))


class Dit(nn.Module):
    """A diffusion transformer (Peebles and Xie, ICCV 2023) of patches of 2 x 2."""

    def __init__(self, width: int = 48, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        channels, height, _ = SHAPE
        self.side, self.given = height // PATCH, Given(width)
        self.first = nn.Linear(channels * PATCH**2, width)
        self.places = nn.Parameter(0.02 * torch.randn(self.side**2, width))
        self.layers = nn.ModuleList(Attended(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, channels * PATCH**2)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Tensor:
        given = self.given(t, class_labels)
        patches = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2)
        hidden = self.first(patches) + self.places
        for layer in self.layers:
            hidden = layer(hidden, given)
        said = self.last(self.norm(hidden)).transpose(1, 2)
        return F.fold(said, x.shape[2:], PATCH, stride=PATCH)


MODELS = {  # model, steps and lr of training
    "mlp": (Mlp, 4000, 1e-3),
    "unet": (UNet, 2500, 2e-3),
    "dit": (Dit, 2500, 2e-3),
}
