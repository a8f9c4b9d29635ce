"""The norm of the selected gradients: docs/equations.md, 6 (paper: clip of S * grad L^f)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import calls, registry
from .arguments import floats, packed_masks, scalar_tensors
from .bits import selected_bits
from .dtypes import accumulate_dtype, wide
from .lists import listed, spread_masks


def formula(grads: Sequence[Tensor], masks: Sequence[Tensor], grad_scale: Tensor | None) -> Tensor:
    """L2 norm [] of the selected, unscaled gradients; inf or NaN if one of them is not finite."""
    device = grads[0].device if grads else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    masks = spread_masks(masks, grads)
    for i, grad in enumerate(grads):
        selected = selected_bits(masks, i, grad)
        value = grad.to(torch.float64)
        if grad_scale is not None:  # unscale as the update does: in the formula's own type
            value = (wide(grad) * (1.0 / scalar_like(grad_scale, grad))).to(torch.float64)
        if selected is not None:  # select, never multiply: 0 * inf is NaN
            value = torch.where(selected, value, 0.0)
        total = total + (value * value).sum()
    return total.sqrt().to(torch.float32)


def scalar_like(value: Tensor, like: Tensor) -> Tensor:
    """[]: on the device of ``like``, in the type it is computed in."""
    return value.reshape(()).to(device=like.device, dtype=accumulate_dtype(like.dtype))


def check(grads: Sequence[Tensor], masks: Sequence[Tensor], grad_scale: Tensor | None) -> None:
    """What the op demands of its arguments; raises ValueError."""
    floats("grads", grads)
    packed_masks(masks, grads)
    scalar_tensors(grads, grad_scale=grad_scale)


SCHEMA = "(Tensor[] grads, Tensor[] masks, Tensor? grad_scale) -> Tensor"


def fake(grads: Sequence[Tensor], masks: Sequence[Tensor], grad_scale: Tensor | None) -> Tensor:
    """Empty outputs, for torch.compile."""
    device = grads[0].device if grads else torch.device("cpu")
    return torch.empty((), dtype=torch.float32, device=device)


registry.define("masked_grad_norm", SCHEMA, formula, check, fake=fake)


def masked_grad_norm(
    grads: Sequence[Tensor],
    masks: Sequence[Tensor] | None = None,
    *,
    grad_scale: Tensor | None = None,
) -> Tensor:
    """L2 norm, fp32 [] on the gradients' device, of the selected gradients divided by
    ``grad_scale``.

    ``masks``: packed uint8 [ceil(n / 8)] per gradient, zero bytes = all selected. inf or NaN tells
    of a non-finite selected gradient. No host synchronisation. Source: docs/equations.md, 6
    (paper: clip of S * grad L^f).
    """
    grads, masks = listed("grads", grads), listed("masks", masks)
    if not grads:
        check(grads, masks, grad_scale)
        return torch.zeros(())
    with torch.no_grad():
        return calls.over_lists("masked_grad_norm", {"grads": grads, "masks": masks}, grad_scale)
