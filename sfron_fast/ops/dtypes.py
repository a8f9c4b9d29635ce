"""Which dtypes formulas are computed in, and which ones kernels take."""

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type a formula is computed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """``x`` in the type it is computed in."""
    return x.to(accumulate_dtype(x.dtype))


def only_reference(dtype: torch.dtype) -> bool:
    """True for fp64: it is there to check other results, and no kernel is built for it."""
    return dtype == torch.float64
