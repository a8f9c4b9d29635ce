"""Formulas in plain PyTorch, by the name of their op: the truth the tests use.

Each lies in its op's file and takes the op's arguments. Only single operations (mul, add, sub, div,
sqrt, maximum) are used, in the order the native kernels use, so that in fp32 the elementwise
results are the same bits everywhere. Low-precision tensors are computed in fp32 and rounded once,
on the store; fp64 stays fp64. Lists may be empty where the schema says so (= "absent"), or flat
(``lists.py``).

``[n]`` is the shape of a tensor flattened in logical order, ``[bytes]`` its packed mask of ceil(n /
8) bytes. Equation numbers are those of docs/equations.md.
"""

from .adamw_step import formula as adamw_step_
from .adaptive_cross_entropy import cross_entropy_log_sums
from .adaptive_cross_entropy import formula as adaptive_cross_entropy
from .adaptive_cross_entropy import gradient as adaptive_cross_entropy_backward
from .adaptive_cross_entropy_over import gradient_ as adaptive_cross_entropy_backward_
from .adaptive_cross_entropy_over import scale_ as adaptive_cross_entropy_scale_
from .adaptive_cross_entropy_over import sum_ as adaptive_cross_entropy_sum_
from .adaptive_mse import formula as adaptive_mse
from .adaptive_mse import gradient as adaptive_mse_backward
from .adaptive_weights import formula as adaptive_weights
from .bits import dithered, pack_bits, unpack_bits
from .dtypes import accumulate_dtype
from .fisher_accumulate import formula as fisher_accumulate_
from .interpolate import formula as interpolate_
from .masked_grad_norm import formula as masked_grad_norm
from .saliency_mask import FISHER_EPS
from .saliency_mask import formula as saliency_mask
from .sample_square_accumulate import formula as sample_square_accumulate_
from .sgd_step import formula as sgd_step_
from .soft_target_kl import formula as soft_target_kl
from .soft_target_kl import gradient as soft_target_kl_backward

__all__ = [
    "FISHER_EPS",
    "accumulate_dtype",
    "adamw_step_",
    "adaptive_cross_entropy",
    "adaptive_cross_entropy_backward",
    "adaptive_cross_entropy_backward_",
    "adaptive_cross_entropy_scale_",
    "adaptive_cross_entropy_sum_",
    "adaptive_mse",
    "adaptive_mse_backward",
    "adaptive_weights",
    "cross_entropy_log_sums",
    "dithered",
    "fisher_accumulate_",
    "interpolate_",
    "masked_grad_norm",
    "pack_bits",
    "saliency_mask",
    "sample_square_accumulate_",
    "sgd_step_",
    "soft_target_kl",
    "soft_target_kl_backward",
    "unpack_bits",
]
