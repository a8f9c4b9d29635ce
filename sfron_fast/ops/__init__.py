"""The ops, one a file. Importing any of them registers all."""

from . import (
    adamw_step,
    adaptive_cross_entropy,
    adaptive_cross_entropy_over,
    adaptive_mse,
    fisher_accumulate,
    interpolate,
    masked_grad_norm,
    saliency_mask,
    sgd_step,
    soft_target_kl,
)

__all__ = [
    "adamw_step",
    "adaptive_cross_entropy",
    "adaptive_cross_entropy_over",
    "adaptive_mse",
    "fisher_accumulate",
    "interpolate",
    "masked_grad_norm",
    "saliency_mask",
    "sgd_step",
    "soft_target_kl",
]
