"""Packed masks of DTensors: a rank's own part of a whole mask, and back."""

from typing import Any

import torch
from torch import Tensor

from ..ops import reference
from ..ops.layout import is_sharded, local


def local_bits(packed: Tensor, param: Any) -> Tensor:
    """The packed mask of a rank's own shard, on its device, of that of the whole parameter.

    A shard need not begin at a whole byte, so the bits are unpacked, split by torch as it split the
    parameter, and packed again.
    """
    if not is_sharded(param):
        return packed.to(param.device)
    from torch.distributed.tensor import distribute_tensor

    selected = reference.unpack_bits(packed, param.shape)
    ours = distribute_tensor(selected, param.device_mesh, param.placements, src_data_rank=None)
    return reference.pack_bits(ours.to_local()).to(param.device)


def whole_bits(packed: Tensor, like: Any) -> Tensor:
    """The packed mask of a whole tensor, on every rank, of those of the shards of ``like`` (a
    collective).
    """
    if not is_sharded(like):
        return packed
    from torch.distributed.tensor import DTensor

    shape = local(like).shape
    ours = reference.unpack_bits(packed, shape).to(torch.uint8)
    split = DTensor.from_local(
        ours, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return reference.pack_bits(split.full_tensor().to(torch.bool)).to(packed.device)
