"""The cases of per-sample squares: a layer's Fisher from what it read and its output gradients."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sfron_fast import functional

from ..harness import Arm, Case
from . import probes

# samples, positions, outputs, features
LINEAR = [(64, (), 1000, 2048), (32, (128,), 768, 3072), (32, (16,), 512, 4608)]
# samples, height and width, outputs, channels, side of the kernel
CONVOLUTIONS = [(32, 32, 64, 64, 3), (32, 8, 256, 256, 3)]
NORMS = [(32, (1024,), 1, 768)]  # deltas are ones: a bias
LARGEST = 1 << 31  # bytes of all samples' gradients, beyond which nobody keeps them


def cases(kind: str, device: str, tiny: bool) -> list[Case]:
    linear, convolutions = [*LINEAR, *NORMS], CONVOLUTIONS
    if tiny:
        linear, convolutions = [(3, (), 4, 5), (3, (6,), 4, 5)], [(2, 4, 3, 2, 3)]
    return [
        *(linear_case(*shape, device) for shape in linear),
        *(convolution_case(*shape, device) for shape in convolutions),
    ]


def linear_case(
    samples: int, positions: tuple[int, ...], outputs: int, features: int, device: str
) -> Case:
    def factors() -> tuple[Tensor, Tensor]:
        on = torch.Generator(device).manual_seed(5)
        made = [
            torch.randn(samples, *positions, lanes, generator=on, device=device)
            for lanes in (outputs, features)
        ]
        return (torch.ones_like(made[0]) if outputs == 1 else made[0]), made[1]

    name = f"{samples} samples x {math.prod(positions)} of {outputs} x {features}"
    return case(name, factors, (outputs, features), device)


def convolution_case(
    samples: int, side: int, outputs: int, channels: int, kernel: int, device: str
) -> Case:
    """The inputs are a view of the padded images; stock arms copy the patches, as torch does."""

    def factors() -> tuple[Tensor, Tensor]:
        on = torch.Generator(device).manual_seed(5)
        padded = side + kernel - 1
        images = torch.randn(samples, channels, padded, padded, generator=on, device=device)
        s, c, h, w = images.stride()
        shape = (samples, side, side, channels, kernel, kernel)
        deltas = torch.randn(samples, outputs, side, side, generator=on, device=device)
        return deltas.permute(0, 2, 3, 1), images.as_strided(shape, (s, h, w, c, h, w))

    name = f"{samples} images {side} x {side}, convolution {channels} to {outputs}"
    return case(name, factors, (outputs, channels, kernel, kernel), device)


def case(
    name: str,
    factors: Callable[[], tuple[Tensor, Tensor]],
    shape: tuple[int, ...],
    device: str,
) -> Case:
    """sum_s g_s^2. Floor: both factors read, the accumulator read and written."""
    deltas, inputs = factors()
    samples = len(deltas)
    moved = 4 * (samples * deltas[0].numel() + inputs.untyped_storage().nbytes() // 4)
    moved += 8 * math.prod(shape)
    gradient = torch.empty(shape, device=device).flatten(1)

    def flat(deltas: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """[samples, positions, lanes]"""
        return (
            deltas.reshape(samples, -1, shape[0]),
            inputs.reshape(samples, -1, math.prod(shape[1:])),
        )

    def batch(total: Tensor, deltas: Tensor, inputs: Tensor) -> None:
        """What a backward pass computes anyway: the difference to it is what samples cost."""
        d, x = flat(deltas, inputs)
        torch.mm(d.flatten(0, 1).T, x.flatten(0, 1), out=gradient)

    def per_sample(total: Tensor, deltas: Tensor, inputs: Tensor) -> None:
        for d, x in zip(*flat(deltas, inputs), strict=True):
            torch.mm(d.T, x, out=gradient)
            total.flatten(1).addcmul_(gradient, gradient)

    def all_at_once(total: Tensor, deltas: Tensor, inputs: Tensor) -> None:
        """What vmap makes of it: every sample's gradient in memory."""
        d, x = flat(deltas, inputs)
        total.flatten(1).add_(torch.bmm(d.transpose(1, 2), x).square_().sum(0))

    def ours(total: Tensor, deltas: Tensor, inputs: Tensor) -> None:
        functional.sample_square_accumulate_(total, deltas, inputs)

    def arm(title: str, add: Callable[..., None], checked: bool = True) -> Arm:
        total, (deltas, inputs) = torch.zeros(shape, device=device), factors()

        def check() -> list[Tensor]:
            add(total, deltas, inputs)
            return [total.clone()]

        return Arm(title, partial(add, total, deltas, inputs), check if checked else None)

    made: list[Callable[[], Arm]] = [
        partial(probes.probe, moved, device),
        partial(arm, "batch gradient alone (torch.mm)", batch, False),
        partial(arm, "mm and addcmul, sample by sample", per_sample),
    ]
    if 4 * samples * math.prod(shape) <= LARGEST:
        made.append(partial(arm, "bmm of all samples, squared", all_at_once))
    return Case(f"{name}, sample squares", [*made, partial(arm, "sfron_fast", ours)], moved)
