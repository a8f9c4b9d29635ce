"""Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys

from paths import ROOT, TESTS


def passes_interpreted(file: str, *select: str) -> None:
    """``file`` of tests passes: TRITON_INTERPRET counts when Triton is imported, and must not reach
    other tests.
    """
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "-q", *select, str(TESTS / file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
