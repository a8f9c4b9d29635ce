"""Where a sample's rows lie in what a function gets or gives."""

from collections.abc import Callable

from torch import Tensor

from ...errors import require

# [samples * k, ...], [positions, samples, ...], [positions * samples, ...], [1, ...] or [positions]
FIRST, SECOND, INNER = "samples first", "samples second", "samples inside the first"
SPREAD = "the same for every sample"


def cutter(layout: str, samples: int) -> Callable[[Tensor], Tensor]:
    """To [samples, k, ...] from a tensor of that layout.

    Raises, when called:
        ValueError: its rows are no whole number for each sample.
    """

    def first(tensor: Tensor) -> Tensor:
        _check(tensor.dim() > 0 and tensor.shape[0] % samples == 0, tensor, samples)
        return tensor.unflatten(0, (samples, -1))

    def second(tensor: Tensor) -> Tensor:
        _check(tensor.dim() > 1 and tensor.shape[1] == samples, tensor, samples)
        return tensor.transpose(0, 1)

    def inner(tensor: Tensor) -> Tensor:
        _check(tensor.dim() > 0 and tensor.shape[0] % samples == 0, tensor, samples)
        return tensor.unflatten(0, (-1, samples)).transpose(0, 1)

    return {SECOND: second, INNER: inner}.get(layout, first)


def _check(good: bool, tensor: Tensor, samples: int) -> None:
    if good:  # words only for what is refused: this is called for every function of every batch
        return
    expected = f"functions over a whole number of rows for each of {samples} samples"
    require(False, "estimator", expected, list(tensor.shape), "use 'batch'")
