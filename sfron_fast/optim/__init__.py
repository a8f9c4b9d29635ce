"""SFRonSGD and SFRonAdamW: torch.optim optimizers with a forget step and a slow step.

A cycle is one ``forget_step()`` (masked, clipped ascent on fast weights) and ``retain_steps`` calls
of ``step()`` (ordinary descent); the last of them also interpolates the slow weights. ``step()``
outside a cycle is the stock optimizer. Source: Huang et al., NeurIPS 2024, as in
docs/equations.md; docs/optimizers.md has the knobs.
"""

from .adamw import SFRonAdamW
from .no_decay import no_decay_groups
from .sgd import SFRonSGD

__all__ = ["SFRonAdamW", "SFRonSGD", "no_decay_groups"]
