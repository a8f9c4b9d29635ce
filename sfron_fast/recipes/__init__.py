"""Published unlearning methods, each a few lines over the package's pieces: SFR-on's settings and its baselines."""

from .baselines import finetune, gradient_ascent
from .sfron import Recipe

__all__ = ["Recipe", "finetune", "gradient_ascent"]
