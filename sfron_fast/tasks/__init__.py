"""What one sample's loss is, whatever a batch looks like: the seam between methods and data."""

from .classification import Classification
from .diffusion import Denoising
from .language import Language
from .objectives import Memorise, Relabel, Surrogate, Unconditional
from .task import Task, Units

__all__ = [
    "Classification",
    "Denoising",
    "Language",
    "Memorise",
    "Relabel",
    "Surrogate",
    "Task",
    "Unconditional",
    "Units",
]
