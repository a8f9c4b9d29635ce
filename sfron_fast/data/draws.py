"""Random numbers by key: each sample has its own, whatever the batch around it, its rank or what
was drawn before.

A number is a hash (splitmix64, Steele et al., OOPSLA 2014) of its sample's key and its place; so a
run that is stopped anywhere goes on with the same ones, and ranks need not draw each other's.
"""

import hashlib
import math

import torch
from torch import Tensor

GOLDEN = -7046029254386353131  # 2^64 / golden ratio, odd, as int64
FIRST, SECOND = -4658895280553007687, -7723592293110705685
BITS = 24  # of a uniform number, all that fp32 holds


def sample_keys(rows: Tensor, *name: object) -> Tensor:
    """A key for each row [samples] (int64 numbers of the samples) of the draw of that name."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return _mix(rows * GOLDEN + int.from_bytes(digest, "little", signed=True))


def uniform(keys: Tensor, count: int) -> Tensor:
    """fp32 [samples, count] in [0, 1), multiples of 2^-24."""
    return _whole(keys, 0, count).to(torch.float32) * 2.0**-BITS


def normal(keys: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Standard normal numbers, fp32 [samples, *shape], by Box and Muller; up to 5.8 in size."""
    count = math.prod(shape)
    pairs = (count + 1) // 2
    whole = _whole(keys, 0, 2 * pairs).to(torch.float32)
    radius = ((whole[:, :pairs] + 1.0) * 2.0**-BITS).log().mul(-2.0).sqrt()  # of (0, 1]
    angle = whole[:, pairs:] * (2.0**-BITS * 2.0 * math.pi)
    both = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
    return both[:, :count].reshape(len(keys), *shape)


def _whole(keys: Tensor, first: int, count: int) -> Tensor:
    """Whole numbers below 2^24, int64 [samples, count]."""
    place = torch.arange(first + 1, first + count + 1, device=keys.device)
    mixed = _mix(keys.unsqueeze(1) + place * GOLDEN)
    return (mixed >> (64 - BITS)) & ((1 << BITS) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 products wrap, and a shift brings in the sign."""
    for shift, factor in ((30, FIRST), (27, SECOND)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))
