"""Warnings that point at the caller's line, however deep in the package they arise."""

import sys
import warnings

PASSED = (__name__.partition(".")[0], "torch")  # torch's decorators lie between the caller and an optimizer


def warn(message: str) -> None:
    """A RuntimeWarning at the first frame outside this package and torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
