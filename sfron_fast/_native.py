"""Finds and loads the compiled kernels (`sfron_fast._C`); remembers why it could not.

Without them every op still runs, on ``reference.py``: slower, same results. ``SFRON_FAST_NATIVE`` decides:
unset = use the kernels if they load, ``0`` = never, ``1`` or ``require`` = raise ImportError if they do not load.
"""

import importlib
import os
import warnings

_reason: str | None = None  # why the native kernels are absent; None once they are loaded
_loaded = False
_told = False


def load() -> None:
    """Import ``_C``, which registers the native kernels with the dispatcher. Called once, by ``ops``."""
    global _reason, _loaded
    wish = os.environ.get("SFRON_FAST_NATIVE", "")
    if wish not in ("", "0", "1", "require"):
        raise ImportError(f"SFRON_FAST_NATIVE: expected 0, 1 or require, found {wish!r}; unset it or use one of those")
    if wish == "0":
        _reason = "switched off by SFRON_FAST_NATIVE=0"
        return
    try:
        importlib.import_module("sfron_fast._C")
        _loaded = True
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "sfron_fast._C"
        _reason = "the package was installed without its compiled kernels" if missing else f"loading failed: {error}"
        if wish:
            raise ImportError(f"SFRON_FAST_NATIVE={wish} but {_reason}; rebuild with `{REMEDY}`") from error


REMEDY = "pip install --no-build-isolation --force-reinstall --no-deps sfron-fast"


def available() -> bool:
    """True if the compiled kernels are loaded."""
    return _loaded


def reason() -> str | None:
    """Why the compiled kernels are absent, or None if they are loaded."""
    return _reason


def warn_once() -> None:
    """Say, the first time a reference kernel stands in for a native one, that it does and why."""
    global _told
    if not _told and not _loaded and os.environ.get("SFRON_FAST_NATIVE") != "0":
        _told = True
        warnings.warn(
            f"sfron_fast runs on its reference kernels (correct, slower): {_reason}. "
            "`python -m sfron_fast env` tells more; SFRON_FAST_NATIVE=0 silences this.",
            RuntimeWarning,
            stacklevel=3,
        )
