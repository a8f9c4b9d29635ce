"""sfron_fast: fast, faithful SFR-on unlearning for PyTorch."""

from . import methods as methods
from .data.paired import PairedLoader
from .evaluation import evaluate
from .evaluation.diffusion import loss_profile
from .evaluation.reference_losses import reference_losses
from .heads import (
    linear_adaptive_cross_entropy,
    linear_logp,
    linear_logp_stats,
    linear_soft_target_kl,
)
from .losses import (
    adaptive_cross_entropy,
    adaptive_cross_entropy_sum_,
    adaptive_mse,
    adaptive_weights,
    soft_target_kl,
)
from .optim import SFRonAdamW, SFRonSGD, no_decay_groups
from .optim.in_backward import step_in_backward
from .runs.budget import retain_budget
from .runs.recipe import Recipe
from .runs.unlearn import UnlearnResult, unlearn
from .saliency.fisher import Fisher, estimate_fisher, estimate_mask
from .saliency.mask import SaliencyMask
from .saliency.overlap import noise_overlap
from .tasks import (
    Classification,
    Denoising,
    Language,
    Memorise,
    Relabel,
    Surrogate,
    Task,
    Unconditional,
)
from .version import __version__
from .weights import (
    ceu_weights,
    dpo_weights,
    npo_weights,
    satimp_weights,
    simnpo_weights,
    wga_weights,
    with_ceiling,
)

__all__ = [
    "Classification",
    "Denoising",
    "Fisher",
    "Language",
    "Memorise",
    "PairedLoader",
    "Recipe",
    "Relabel",
    "SFRonAdamW",
    "SFRonSGD",
    "SaliencyMask",
    "Surrogate",
    "Task",
    "Unconditional",
    "UnlearnResult",
    "__version__",
    "adaptive_cross_entropy",
    "adaptive_cross_entropy_sum_",
    "adaptive_mse",
    "adaptive_weights",
    "ceu_weights",
    "dpo_weights",
    "estimate_fisher",
    "estimate_mask",
    "evaluate",
    "linear_adaptive_cross_entropy",
    "linear_logp",
    "linear_logp_stats",
    "linear_soft_target_kl",
    "loss_profile",
    "no_decay_groups",
    "noise_overlap",
    "npo_weights",
    "reference_losses",
    "retain_budget",
    "satimp_weights",
    "simnpo_weights",
    "soft_target_kl",
    "step_in_backward",
    "unlearn",
    "wga_weights",
    "with_ceiling",
]
