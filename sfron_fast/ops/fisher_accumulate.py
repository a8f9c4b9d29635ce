"""Sums of squared gradients, the diagonal of the Fisher matrix: docs/equations.md, 2."""

from collections.abc import Sequence

from torch import Tensor

from ..errors import number, require
from . import calls, registry
from .arguments import flat_list, floats, numbers_of
from .dtypes import accumulate_dtype
from .lists import flat_size, is_flat, listed, spread


def formula(
    fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float, numbers: Tensor | None = None
) -> None:
    """F += weight * g^2, F in fp32 (fp64 for fp64)."""
    weight = weight if numbers is None else numbers.item()
    for f, g in zip(spread(fisher, grads), grads, strict=True):
        wide = g.to(f.dtype)
        f.add_((wide * wide) * weight)


def check(
    fisher: Sequence[Tensor], grads: Sequence[Tensor], weight: float, numbers: Tensor | None = None
) -> None:
    """What the op demands of its arguments; raises ValueError."""
    floats("grads", grads)
    _check_fisher("fisher", fisher, grads)
    (weight,) = numbers_of(numbers, (weight,), grads)
    number("weight", weight, 0.0)


def _check_fisher(name: str, fisher: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """fp32 (fp64 for fp64) beside each gradient and of its shape; or a flat list."""
    if is_flat(fisher, grads):
        flat_list(name, fisher[0], grads, flat_size(grads))
        fisher = spread(fisher, grads)
    require(len(fisher) == len(grads), name, f"{len(grads)} tensors", len(fisher))
    for i, (f, g) in enumerate(zip(fisher, grads, strict=True)):
        wanted = accumulate_dtype(g.dtype)
        require(f.shape == g.shape, f"{name}[{i}]", f"shape {tuple(g.shape)}", tuple(f.shape))
        require(f.dtype == wanted, f"{name}[{i}]", f"dtype {wanted}", f.dtype)
        require(f.device == g.device, f"{name}[{i}]", f"device {g.device}", f.device)


SCHEMA = "(Tensor(a!)[] fisher, Tensor[] grads, float weight, Tensor? numbers=None) -> ()"


registry.define("fisher_accumulate_", SCHEMA, formula, check)


def fisher_accumulate_(
    fisher: Sequence[Tensor],
    grads: Sequence[Tensor],
    weight: float,
    *,
    numbers: Tensor | None = None,
) -> None:
    """fisher += weight * grad^2, fp32 accumulators (fp64 for fp64 gradients), in place.

    ``numbers``: fp64 [1] beside the tensors: weight in place of the number, as in ``interpolate_``.
    """
    fisher, grads = listed("fisher", fisher), listed("grads", grads)
    if not fisher:
        return require(not grads, "grads", "0 tensors", len(grads))
    calls.over_lists(
        "fisher_accumulate_",
        {"fisher": fisher, "grads": grads},
        weight,
        numbers,
        changed=("fisher",),
    )
