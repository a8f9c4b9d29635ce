"""Published unlearning methods, each a few lines over the package's pieces: SFR-on's settings and
its baselines.
"""

from .baselines import (
    bad_teacher,
    finetune,
    gradient_ascent,
    gradient_saliency,
    random_label,
    salun,
    scrub,
    selective_amnesia,
    wrong_labels,
)
from .sfron import Recipe

__all__ = [
    "Recipe",
    "bad_teacher",
    "finetune",
    "gradient_ascent",
    "gradient_saliency",
    "random_label",
    "salun",
    "scrub",
    "selective_amnesia",
    "wrong_labels",
]
