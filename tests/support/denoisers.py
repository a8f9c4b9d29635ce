"""A small denoiser that is no framework's, a schedule, and labelled vectors."""

import torch
from torch import nn

CLASSES, FEATURES, STEPS = 4, 6, 50
NULL = CLASSES
KEPT = torch.linspace(1e-4, 0.2, STEPS, dtype=torch.float64).neg().add(1).cumprod(0)


class Denoiser(nn.Module):
    """x [samples, FEATURES], t [samples], class -> the noise."""

    def __init__(self, width=16, outputs=FEATURES):
        super().__init__()
        self.classes = nn.Embedding(CLASSES + 1, width)
        self.times = nn.Linear(2, width)
        self.first, self.last = nn.Linear(FEATURES, width), nn.Linear(width, outputs)

    def forward(self, x, t, class_labels=None):
        angle = t.to(x.dtype).unsqueeze(1) / STEPS
        hidden = self.first(x) + self.times(torch.cat([angle.sin(), angle.cos()], 1))
        if class_labels is not None:
            hidden = hidden + self.classes(class_labels)
        return self.last(torch.nn.functional.silu(hidden))


def denoiser(dtype=torch.float32, seed=0, **sizes):
    torch.manual_seed(seed)
    return Denoiser(**sizes).to(dtype)


def images(count, dtype=torch.float32, seed=1, label=None):
    """(x0, classes): a blob for each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    if label is not None:
        labels.fill_(label)
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
    return (centres[labels] + 0.1 * noise).to(dtype), labels
