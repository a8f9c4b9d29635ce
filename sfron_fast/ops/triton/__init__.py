"""Row kernels in Triton for CUDA tensors. Triton itself is imported when the first CUDA tensor
arrives.

Where it is missing, or cannot build a kernel, the checked reference kernel serves and says so once,
with the reason. Nothing here looks for a device.
"""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..dtypes import only_reference

MODULES = {
    "adaptive_cross_entropy": "adaptive_cross_entropy",
    "adaptive_cross_entropy_backward": "adaptive_cross_entropy",
    "adaptive_cross_entropy_backward_": "adaptive_cross_entropy",
    "adaptive_cross_entropy_sum_": "adaptive_cross_entropy",
    "adaptive_cross_entropy_scale_": "adaptive_cross_entropy",
    "adaptive_mse": "adaptive_mse",
    "adaptive_mse_backward": "adaptive_mse",
    "linear_gradient_": "linear_rows",
    "linear_kl_gradient": "linear_kl_rows",
    "linear_kl_sums_": "linear_kl_rows",
    "linear_log_sums_": "linear_rows",
    "linear_moments_": "linear_moments",
    "sample_square_accumulate_": "sample_square_accumulate",
    "soft_target_kl": "soft_target_kl",
    "soft_target_kl_backward": "soft_target_kl",
}

REMEDY = "pip install triton"
_reasons: dict[str, str] = {}  # op -> why its Triton kernel does not serve
_told = False


def launcher(name: str) -> Callable[..., Any] | None:
    """The launcher of an op, with the op's own arguments, or None (see ``reason``)."""
    if name in _reasons:
        return None
    try:
        module = importlib.import_module(f"{__name__}.{MODULES[name]}")
    except Exception as error:  # a broken Triton may raise anything while it is imported
        for op in MODULES:
            _reasons[op] = f"importing Triton failed: {error}; to get it: {REMEDY}"
        return None
    return getattr(module, name)


def reason(name: str) -> str | None:
    """Why the Triton kernel of an op does not serve, or None if it does (as far as one can tell
    without a GPU).
    """
    launcher(name)
    return _reasons.get(name)


def capturing(like: torch.Tensor) -> bool:
    """Whether the current stream of the tensor's device, which need not be the current one, is
    captured in a graph.
    """
    if not like.is_cuda:
        return False
    with torch.cuda.device(like.device):
        return torch.cuda.is_current_stream_capturing()


def op_kernel(
    name: str, check: Callable[..., Any], default: Callable[..., Any]
) -> Callable[..., Any]:
    """What the dispatcher calls for CUDA tensors: check, then the Triton kernel, or ``default``
    where it cannot.
    """

    def kernel(*args: Any, **kwargs: Any) -> Any:
        launch = launcher(name)
        rows = args[1 if "_backward" in name else 0]
        if launch is None or only_reference(rows.dtype):
            _warn_once(name)
            return default(*args, **kwargs)
        check(*args, **kwargs)
        try:
            return launch(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler for Triton's launcher, a GPU it does not know, ...
            if capturing(rows):  # says nothing of the kernel: CUDA loads none while it captures
                raise RuntimeError(
                    f"sfron_fast::{name}: expected a kernel that has run before the capture of a"
                    " CUDA graph, found one that could not be launched within it"
                    f" ({type(error).__name__}: {error}); call the op once with tensors of this"
                    " shape and dtype before the capture"
                ) from error
            # outputs are fresh, or written by the last launch alone, which has not happened: the
            # reference can start over; a GPU in an error state fails there again
            _reasons[name] = f"{type(error).__name__}: {error}"
            _warn_once(name)
            return default(*args, **kwargs)

    return kernel


def _warn_once(name: str) -> None:
    global _told
    if name in _reasons and not _told:
        _told = True
        warnings.warn(
            f"sfron_fast runs {name} on its reference kernel (correct, slower) on CUDA:"
            f" {_reasons[name]}. `python -m sfron_fast env` tells more.",
            RuntimeWarning,
            stacklevel=3,
        )
