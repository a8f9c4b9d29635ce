"""Finds and loads the compiled kernels (`sfron_fast._C`); remembers why it could not.

Without them every op still runs, on ``reference.py``: slower, same results. ``SFRON_FAST_NATIVE``
decides: unset = use the kernels if they load, ``0`` = never, ``1`` or ``require`` = raise
ImportError if they do not load.
"""

import importlib
import importlib.metadata
import json
import os
import warnings
from itertools import chain
from operator import is_
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

_reason: str | None = None  # why the native kernels are absent; None once they are loaded
_module: Any = None
_told = False


def load() -> None:
    """Import ``_C``, which registers the native kernels with the dispatcher.

    Called once, by ``ops``.
    """
    global _reason, _module
    wish = os.environ.get("SFRON_FAST_NATIVE", "")
    if wish not in ("", "0", "1", "require"):
        raise ImportError(
            f"SFRON_FAST_NATIVE: expected 0, 1 or require, found {wish!r}; unset it or use one of"
            " those"
        )
    if wish == "0":
        _reason = "switched off by SFRON_FAST_NATIVE=0"
        return
    try:
        _module = importlib.import_module("sfron_fast._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "sfron_fast._C"
        _reason = (
            "the package was installed without its compiled kernels"
            if missing
            else f"loading failed: {error}"
        )
        if wish:
            raise ImportError(
                f"SFRON_FAST_NATIVE={wish} but {_reason}; rebuild with `{remedy()}`"
            ) from error


def learn_keys(plain: Any, keys: int, negated: Any, negated_keys: int) -> None:
    """Show ``_C`` where a tensor keeps the bit that turns the sign of its values; it asks each
    tensor otherwise.

    ``plain`` and ``negated`` are two tensors of one dimension, beside the words that hold their
    dispatch keys.
    """
    if _module is not None:
        _module.learn_keys(plain, keys, negated, negated_keys)


def remedy() -> str:
    """The command that builds the kernels for the torch that is there: from the checkout this file
    lies in, or from where the package was installed.
    """
    source, option = Path(__file__).resolve().parents[2], "-e "
    if not (source / "setup.py").exists():
        source, option = _installed_from(), ""
    return f"pip install --no-build-isolation --force-reinstall --no-deps {option}{source}"


def _installed_from() -> Any:
    """The folder that pip has noted, or words that stand for it."""
    try:
        noted = importlib.metadata.distribution("sfron-fast").read_text("direct_url.json")
        url = json.loads(noted or "{}").get("url", "")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        url = ""
    there = Path(url2pathname(urlsplit(url).path)) if url.startswith("file://") else None
    return there if there is not None and there.exists() else "PATH_TO_THE_SOURCE"


def switched_off() -> bool:
    """Whether the caller's own switch is why the kernels are absent."""
    return os.environ.get("SFRON_FAST_NATIVE") == "0"


def available() -> bool:
    """True if the compiled kernels are loaded."""
    return _module is not None


def reason() -> str | None:
    """Why the compiled kernels are absent, or None if they are loaded."""
    return _reason


def warn_once() -> None:
    """Say, the first time a reference kernel stands in for a native one, that it does and why."""
    global _told
    if not _told and _module is None and not switched_off():
        _told = True
        warnings.warn(
            f"sfron_fast runs on its reference kernels (correct, slower): {_reason}. "
            "`python -m sfron_fast env` tells more; SFRON_FAST_NATIVE=0 silences this.",
            RuntimeWarning,
            stacklevel=3,
        )


# --- looks at lists of thousands of objects, which Python alone would take one by one -------------

ROW_WORDS = 6  # int64 of a tensor's row in a table (csrc/host/table.h)


def table_words(lists: tuple[Any, ...]) -> int:
    """Length of the int64 table that ``describe`` fills."""
    return len(lists) + ROW_WORDS * sum(map(len, lists))


class Tabled(list[Any]):
    """Tensors and the table of them, made before; good until other code may run."""

    def __init__(self, tensors: list[Any], table: Any) -> None:
        super().__init__(tensors)
        self.table = table  # int64 [ROW_WORDS * len]


# how lists can be served: not by a table, by one, or by one of contiguous copies (fp64: not at all)
BY_HANDLES, BY_TABLE, BY_COPIES = range(3)


def describe(table: Any, lists: tuple[Any, ...]) -> int:
    """Write pointer, shape, dtype and device of every tensor into ``table``, int64
    [table_words(lists)] on the CPU.

    In place of a list may be its table, also one that lies in ``table`` where it belongs, or a
    tuple of such parts.

    BY_HANDLES if one of them is not a plain tensor or parameter on a device with native kernels:
    then call the op itself. BY_COPIES if one is not contiguous, or fp64, which no native kernel
    takes.
    """
    return BY_HANDLES if _module is None else _module.describe(table, lists)


def gather(params: list[Any], tables: tuple[Any, ...], *before: Any) -> list[Any] | None:
    """The parameters' gradients; both are written to their tables in one pass.

    ``tables`` are two int64 [ROW_WORDS * len] on the CPU; what they hold of an earlier call is a
    prefetching hint. None if a gradient is missing, or if one of them all is not contiguous or not
    what a table can hold. ``before``, the parameters of an earlier step and their table: also None
    unless they are the same, of the sizes, dtypes and devices that they had, and the gradients
    have shape, dtype and device of theirs.
    """
    return None if _module is None else _module.gather(params, *tables, *before)


def ask_huge_pages(tensor: Any) -> None:
    """Advise Linux to back a large tensor on the CPU, not yet written to, by huge pages."""
    if _module is not None:
        _module.ask_huge_pages(tensor, tensor.nbytes)


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether both lists hold the very same objects."""
    return _module.same(a, b) if _module is not None else len(a) == len(b) and all(map(is_, a, b))


def same_values(dicts: list[dict[Any, Any]], values: list[Any]) -> bool:
    """Whether the values of all dicts, in order, are the very objects of the list."""
    return (
        _module.same_values(dicts, values)
        if _module is not None
        else same(list(all_values(dicts)), values)
    )


def all_values(dicts: list[dict[Any, Any]]) -> chain[Any]:
    """The values of all dicts, in order."""
    return chain.from_iterable(map(dict.values, dicts))
