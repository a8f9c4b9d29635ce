"""What one sample's loss is, whatever a batch looks like: the seam between methods and data."""

from .classification import Classification
from .language import Language
from .task import Task, Units

__all__ = ["Classification", "Language", "Task", "Units"]
