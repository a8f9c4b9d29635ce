"""Stateless functions over lists of tensors; ``ops/calls.py`` says what they have in common."""

from .ops.adamw_step import adamw_step_
from .ops.bits import pack_bits
from .ops.fisher_accumulate import fisher_accumulate_
from .ops.interpolate import interpolate_
from .ops.masked_grad_norm import masked_grad_norm
from .ops.saliency_mask import saliency_mask
from .ops.sample_square_accumulate import sample_square_accumulate_
from .ops.sgd_step import sgd_step_

__all__ = [
    "adamw_step_",
    "fisher_accumulate_",
    "interpolate_",
    "masked_grad_norm",
    "pack_bits",
    "saliency_mask",
    "sample_square_accumulate_",
    "sgd_step_",
]
