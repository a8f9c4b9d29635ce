"""Files that are written whole or not at all."""

import glob
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import require


def write_whole(path: Path, fill: Callable[[Path], Any]) -> None:
    """Let ``fill`` write a file beside ``path``, then put it in place at once; failing leaves
    ``path`` as it was. Folders on the way are made.

    Raises:
        ValueError: there is a folder at ``path``.
    """
    require(not path.is_dir(), "path", "a file's", f"a folder at {path}", "add a file name")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fill(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Delete what writers of ``path`` left beside it when they were killed; for where only one
    process writes it.
    """
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)
