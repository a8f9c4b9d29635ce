"""Moments in 8 bits as a state dict holds them: in fp32, parameter by parameter."""

from typing import Any

import torch
from torch import Tensor

from ..distributed.shards import sharded_like
from ..ops.layout import is_sharded, local, orders_of, unordered
from ..ops.moment_codes import decode, encode
from .state_kind import CODES, FORGET, StateKind, in_order, is_coded

PLACES = {"exp_avg": 0, "exp_avg_sq": 1, "momentum_buffer": 0}  # of a moment in its scales


def decoded(state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """A parameter's state with fp32 in place of codes and scales, on the CPU unless it is sharded.

    A rank's shard stays where it is: torch.distributed.checkpoint moves it (``cpu_offload``).
    """
    found = dict(state)
    for begin in ("", FORGET):
        scales = found.pop(begin + "scales", None)
        for key, place in PLACES.items():
            codes = found.get(begin + key)
            if scales is None or codes is None or codes.dtype not in CODES:
                continue
            part = decode(_rows(codes), local(scales)[..., place].to(codes.device))
            whole = _unrowed(part, codes)
            found[begin + key] = whole if is_sharded(param) else whole.cpu()
    return found


def coded(state: dict[str, Any], kinds: dict[str, StateKind], param: Tensor) -> dict[str, Any]:
    """A parameter's state with codes and scales in place of moments, where its ``kinds`` want them.

    What was codes before becomes the same codes.
    """
    found = dict(state)
    if not is_coded(param):
        return found
    for begin in ("", FORGET):
        kind = kinds.get(begin + "scales")
        moments = [key for key in PLACES if kind is not None and found.get(begin + key) is not None]
        if kind is None or not moments:
            continue
        shape = kind.shape_of(local(param))
        scales = torch.zeros(shape, device=param.device)
        for key in moments:
            dtype = kinds[begin + key].dtype
            assert dtype is not None
            moment = found[begin + key].to(param.device, torch.float32)
            like = torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
            codes, factors = encode(_rows(like.copy_(moment)), None, dtype)
            found[begin + key] = _unrowed(codes, like)
            scales[..., PLACES[key]] = factors
        found[begin + "scales"] = sharded_like(param, scales, kind.shape_of(param))
    return found


def _rows(tensor: Tensor) -> Tensor:
    """A rank's part, in the order of memory."""
    return in_order(local(tensor))


def _unrowed(part: Tensor, like: Tensor) -> Tensor:
    """What ``_rows`` of ``like`` was, back in its shape and layout."""
    if is_sharded(like):
        return sharded_like(like, part.view(local(like).shape), like.shape)
    (order,) = orders_of([like]) or (None,)
    return unordered(part.reshape(-1), like.shape, order)
