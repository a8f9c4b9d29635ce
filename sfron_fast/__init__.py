"""sfron_fast: fast, faithful SFR-on unlearning for PyTorch."""

from .evaluation import evaluate
from .fisher import Fisher, estimate_fisher, estimate_mask
from .in_backward import step_in_backward
from .loader import PairedLoader
from .losses import (
    adaptive_cross_entropy,
    adaptive_cross_entropy_sum_,
    adaptive_mse,
    adaptive_weights,
    soft_target_kl,
)
from .optim import SFRonAdamW, SFRonSGD
from .recipes import Recipe
from .saliency import SaliencyMask
from .unlearning import UnlearnResult, unlearn

__version__ = "0.1.0"
__all__ = [
    "Fisher",
    "PairedLoader",
    "Recipe",
    "SFRonAdamW",
    "SFRonSGD",
    "SaliencyMask",
    "UnlearnResult",
    "adaptive_cross_entropy",
    "adaptive_cross_entropy_sum_",
    "adaptive_mse",
    "adaptive_weights",
    "estimate_fisher",
    "estimate_mask",
    "evaluate",
    "soft_target_kl",
    "step_in_backward",
    "unlearn",
]
