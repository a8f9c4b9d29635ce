"""Warnings that point at the caller's line, however deep in the package they arise."""

import sys
import warnings


def warn(message: str) -> None:
    """A RuntimeWarning at the first frame outside this package."""
    level, frame = 1, sys._getframe()
    package = __name__.partition(".")[0]
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RuntimeWarning, stacklevel=level)
