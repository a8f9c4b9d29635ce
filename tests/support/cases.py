"""Inputs that every op is tested with."""

import math
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

LOW = [torch.bfloat16, torch.float16]


NATIVE_DTYPES = [torch.float32, *LOW]


DTYPES = [*NATIVE_DTYPES, torch.float64]


OTHER_STATES = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]


ODD = [(1,), (63,), (), (64,), (0,), (65,), (7, 9), (3, 0, 2)]


TILES = [(511,), (512,), (513,), (65535,), (65536,), (65537,)]


# rows of 320 and 96: moments in codes, a group and less of one; the last gives two threads work
MIXED = [*ODD, (513,), (7, 320), (33, 3, 32), (40001,)]


MANY = [((7 * i) % 131,) for i in range(3000)]


SIZES = {"empty tensor": [(0,)], "0-dim": [()], "odd": ODD, "tiles": TILES, "many": MANY}


LAYOUT_SHAPES = [(5,), (33, 17), (3, 2, 96), (2, 3, 5, 7), ()]


SPECIAL = [
    math.inf,
    -math.inf,
    math.nan,
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    6e-8,
    1.2e-38,
    3.4e38,
    -65504.0,
    1e-20,
    1.0,
]


def only_long(value):
    """A parameter that only `make test-long` takes."""
    return pytest.param(value, marks=pytest.mark.long)


def mostly_long(every, *quick):
    """All of ``every`` as parameters; those that are not ``quick`` are for `make test-long`."""
    return [value if value in quick else only_long(value) for value in every]


def values(shape, dtype, device, *, scale=1.0, special=0) -> Tensor:
    """Normal numbers; with ``special`` = 1, 2, ...

    every second one is from SPECIAL, in an order of that number.
    """
    x = torch.randn(shape, dtype=torch.float64) * scale
    if special:
        flat = x.view(-1)
        picks = torch.tensor(SPECIAL, dtype=torch.float64)
        count = flat[::2].numel()
        flat[::2] = picks[
            (torch.arange(count) * special + torch.arange(count) // len(SPECIAL)) % len(SPECIAL)
        ]
    return x.to(dtype).to(device)


def value_list(shapes, dtype, device, *, scale=1.0, special=0) -> list[Tensor]:
    sizes = [math.prod(shape) for shape in shapes]
    whole = values(sum(sizes), dtype, device, scale=scale, special=special)
    return [
        part.clone().view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)
    ]


def mask_bits(shape, device, density=0.5) -> Tensor:
    return (torch.rand(shape) < density).to(device)


@dataclass
class Case:
    """Arguments of one op by name: tensors, lists of tensors or None, and numbers."""

    tensors: dict[str, Any]
    scalars: dict[str, Any]

    def map(self, f: Callable[[Tensor], Tensor]) -> "Case":
        def each(value):
            if isinstance(value, list):
                return [f(t) for t in value]
            return None if value is None else f(value)

        return Case({k: each(v) for k, v in self.tensors.items()}, dict(self.scalars))

    def clone(self) -> "Case":
        return self.map(lambda t: t.detach().clone(memory_format=torch.contiguous_format))

    def run(self, kernel):
        return kernel(**self.tensors, **self.scalars)

    def flat(self) -> list[tuple[str, Tensor]]:
        named = []
        for name, value in self.tensors.items():
            if isinstance(value, list):
                named += [(f"{name}[{i}]", t) for i, t in enumerate(value)]
            elif value is not None:
                named.append((name, value))
        return named


def shifted(tensor: Tensor) -> Tensor:
    """The same values one element after the start of a buffer: contiguous, but not aligned."""
    buffer = torch.full((tensor.numel() + 2,), 7, dtype=tensor.dtype, device=tensor.device)
    view = buffer[1:-1].view(tensor.shape)
    view.copy_(tensor)
    return view


def strided(tensor: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor
    wide = torch.full(
        (*tensor.shape[:-1], tensor.shape[-1] * 2), 7, dtype=tensor.dtype, device=tensor.device
    )
    wide[..., ::2] = tensor
    return wide[..., ::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def negated(tensor: Tensor) -> Tensor:
    """Contiguous, with the other sign in memory: torch tells by a bit of the tensor alone."""
    return torch._neg_view(-tensor)


LAYOUTS = {
    "strided": strided,
    "transposed": transposed,
    "channels-last": channels_last,
    "negated": negated,
}


def lazy_zeros(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where they are written (reads share the kernel's zero page)."""
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize), dtype=dtype)
