"""torch's attention, opened: the functions in it are seen one by one."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def open_attention() -> Callable[..., Any]:
    """F.multi_head_attention_forward, in which the mode sees every function.

    As it stands it asks whether a mode is there, and hands itself over to it whole. Here it is the
    same code with that question answered no, and with each projection by the whole packed weight.
    """
    inside: dict[str, Any] = {**vars(F), "has_torch_function": lambda _: False}
    for name in ("multi_head_attention_forward", "_in_projection"):
        f: Any = getattr(F, name)
        inside[name] = FunctionType(f.__code__, inside, name, f.__defaults__, f.__closure__)
        inside[name].__kwdefaults__ = f.__kwdefaults__
    inside["_in_projection_packed"] = _in_projection_packed
    return inside["multi_head_attention_forward"]


def _in_projection_packed(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None
) -> list[Tensor]:
    """Queries, keys and values; torch cuts w apart where they are not of one tensor."""
    if q is k and k is v:
        return [part.contiguous() for part in F.linear(q, w, b).chunk(3, -1)]
    return [F.linear(x, w, b).chunk(3, -1)[i].contiguous() for i, x in enumerate((q, k, v))]
