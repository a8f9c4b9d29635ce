"""DTensors (FSDP2, HSDP, tensor parallelism): kernels work on a rank's own shard; torch's engine
moves the rest.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import require
from ..ops.layout import is_sharded, local

# a device mesh, and those of its dimensions that split the tensor
Layout = tuple[Any, tuple[int, ...]]
FLATTENED = {"_fsdp_flattened": "FullyShardedDataParallel (FSDP1)", "ds_id": "DeepSpeed ZeRO"}
FSDP2 = (
    "shard with fully_shard of torch.distributed.fsdp (FSDP2); in the yaml of accelerate that is"
    " 'distributed_type: FSDP' with 'fsdp_version: 2' under 'fsdp_config:'"
)
_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
Place = tuple[torch.device, Layout | None]


def plain(tensors: list[Any]) -> bool:
    """Whether none of them is a DTensor; a look at the types, for lists of thousands."""
    return _PLAIN.issuperset(map(type, tensors)) or not any(map(is_sharded, tensors))


def whole(tensor: Any) -> Tensor:
    """All of a DTensor, on every rank (a collective); any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def placed(value: Any, like: Any) -> Any:
    """A whole tensor in shards as ``like``, if that is a DTensor of its shape; else the value."""
    whole = isinstance(value, Tensor) and not is_sharded(value)
    if not (whole and is_sharded(like) and value.shape == like.shape):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, kinds = like.device_mesh, like.placements
    there = value.detach().to(mesh.device_type)
    split = distribute_tensor(there, mesh, kinds, src_data_rank=None).to_local().to(like.device)
    return DTensor.from_local(split, mesh, kinds, shape=like.shape, stride=like.stride())


def sharded_like(like: Any, part: Tensor, shape: torch.Size) -> Tensor:
    """A rank's part of a contiguous tensor of that shape as a DTensor placed as ``like``; of what
    is no DTensor the part itself.
    """
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    mesh, kinds = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, kinds, shape=shape, stride=stride)


def split_by_rows(tensor: Any) -> bool:
    """Whether a rank has whole indices of the first dimension."""
    return all(p.is_replicate() or p.is_shard(0) for p in getattr(tensor, "placements", ()))


def finite(tensor: Tensor) -> bool:
    """Whether all numbers of it, or of this rank's shard of it, are finite."""
    return bool(torch.isfinite(local(tensor.detach())).all())


def place(tensor: Any) -> Place:
    """What the tensors of one call have in common: the device, and for DTensors the mesh and how it
    splits them.
    """
    if not is_sharded(tensor):
        return tensor.device, None
    split = tuple(i for i, p in enumerate(tensor.placements) if not p.is_replicate())
    return tensor.device, (tensor.device_mesh, split)


def sharded_places(params: list[Tensor]) -> dict[Place, None]:
    """The places of the DTensors among them, in order, the same on every rank."""
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (
        {}
        if not ranks or plain(params)
        else dict.fromkeys(place(p) for p in params if is_sharded(p))
    )


def placed_gradient(param: Any) -> Tensor | None:
    """A parameter's gradient, placed as it; tensor parallelism may leave one that is yet to be
    summed over ranks.
    """
    grad = param.grad
    if grad is not None and is_sharded(param) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


def whole_norm(norm: Tensor, layout: Layout | None) -> Tensor:
    """The norm of all shards from that of each; the same bits on every rank. One collective per
    splitting dimension.

    The squares of fp32 norms are exact in fp64. The mesh's device carries the sum, also for
    offloaded parameters.
    """
    if layout is None or not layout[1]:
        return norm
    mesh, split = layout
    total = norm.to(mesh.device_type, torch.float64).square()
    for dim in split:
        torch.distributed.all_reduce(total, group=mesh.get_group(dim))
    return total.sqrt().to(norm)


def anywhere(flag: bool, params: list[Tensor]) -> bool:
    """Whether the flag is set on any rank that has shards of ``params``."""
    for _, layout in sharded_places(params):
        flag = bool(whole_norm(torch.tensor(float(flag)), layout))
    return flag


def check_wrapper(model: torch.nn.Module) -> None:
    """``check_whole`` of a model, whose wrapper also tells before it has flattened anything.

    Raises:
        ValueError: FSDP1 or DeepSpeed has a part in it.
    """
    names = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    known = {"FullyShardedDataParallel": "_fsdp_flattened", "DeepSpeedEngine": "ds_id"}
    marks = {mark for name, mark in known.items() if name in names}
    marks |= {mark for mark in FLATTENED if any(hasattr(p, mark) for p in model.parameters())}
    found = " and ".join(FLATTENED[mark] for mark in FLATTENED if mark in marks)
    require(not marks, "model", "a plain one, or one of DDP or fully_shard", found, FSDP2)


def check_whole(params: list[Any]) -> None:
    """Masks and states belong to whole parameters, or their DTensors.

    Raises:
        ValueError: a wrapper has flattened the parameters.
    """
    for mark, culprit in FLATTENED.items():
        flattened = any(hasattr(p, mark) for p in params)
        require(not flattened, "params", "parameters, or DTensors", f"those of {culprit}", FSDP2)
