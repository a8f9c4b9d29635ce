"""A small VAE of digits, and networks that tell every image from every other."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.diffusion.digits import Digits, load

LATENT, WIDTH, EMBEDDED = 16, 256, 32
VARIANCE = 0.05  # of a pixel around what is generated, of [-1, 1]
BATCH, LR, EPOCHS = 64, 2e-3, 60
NOISE, SPREAD, TEMPERATURE, PAIRS, STEPS = 0.2, 0.7, 0.2, 128, 1000  # of an identity network


def read(path: Path | None) -> tuple[Tensor, Tensor]:
    """Images to learn and held-out ones, [images, pixels] in [-1, 1]: scikit-learn's digits, or
    those of an npz file with ``images`` uint8 [images, height, width], a fifth of them held out.
    """
    if path is None:
        digits: Digits = load()
        return digits.images.flatten(1), digits.held_out.flatten(1)
    with np.load(path) as file:
        images = torch.from_numpy(file["images"]).float().flatten(1) / 127.5 - 1.0
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[len(order) // 5 :]], images[order[: len(order) // 5]]


def layers(*sizes: int) -> list[nn.Module]:
    """Linear layers with ReLU between them."""
    made: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        made += [nn.Linear(inputs, outputs), nn.ReLU()]
    return made[:-1]


class VAE(nn.Module):
    """``generator``: latents [images, 16] -> images [images, pixels]."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*layers(pixels, WIDTH, WIDTH, 2 * LATENT))
        self.generator = nn.Sequential(*layers(LATENT, WIDTH, WIDTH, pixels), nn.Tanh())

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Means, which are the images' latents, and log-variances."""
        mean, log_variance = self.encoder(images).chunk(2, 1)
        return mean, log_variance

    def near(self, images: Tensor, spread: float = 1.0) -> Tensor:
        """Images of latents drawn around those of ``images``."""
        mean, log_variance = self.posterior(images)
        return self.generator(mean + spread * (0.5 * log_variance).exp() * torch.randn_like(mean))


def train_vae(images: Tensor, seed: int) -> VAE:
    """On the evidence bound."""
    torch.manual_seed(seed)
    vae = VAE(images.shape[1])
    steps = EPOCHS * -(-len(images) // BATCH)
    adam = torch.optim.Adam(vae.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, LR, steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            x = images[rows]
            mean, log_variance = vae.posterior(x)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).sum(1)
            error = (vae.near(x) - x).square().sum(1) / (2.0 * VARIANCE)
            adam.zero_grad()
            (error + kl).mean().backward()
            adam.step()
            schedule.step()
    return vae.eval()


class Identity(nn.Module):
    """Images to points on a sphere [images, 32]: versions of one image lie together."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers(pixels, WIDTH, WIDTH, EMBEDDED))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.body(images), dim=1)


def train_identity(vae: VAE, images: Tensor, seed: int) -> Identity:
    """By contrast: of two versions of each image in a batch, which belong together?

    A version is the image, or what the generator draws near it, with noise.
    """
    torch.manual_seed(seed)
    network = Identity(images.shape[1])
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(STEPS):
        x = images[torch.randint(len(images), (PAIRS,))]

        def version(x: Tensor = x) -> Tensor:
            with torch.no_grad():
                drawn = torch.where(torch.rand(len(x), 1) < 0.5, x, vae.near(x, SPREAD))
            return network(drawn + NOISE * torch.randn_like(x))

        alike = version() @ version().T / TEMPERATURE
        adam.zero_grad()
        F.cross_entropy(alike, torch.arange(len(x))).backward()
        adam.step()
    return network.eval()
