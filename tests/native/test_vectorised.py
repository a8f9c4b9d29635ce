"""Independent loops are vector code at every instruction set, with every option of an op.

A loop that GCC gives up on still computes the right bits, up to ten times slower; only its report
tells.
"""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORT = re.compile(
    r"csrc/(\S+?):(\d+):\d+: (optimized: loop vectorized|missed: couldn't vectorize loop)"
)


def is_gcc() -> bool:
    if shutil.which("g++") is None:
        return False
    macros = subprocess.run(
        ["g++", "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True
    ).stdout
    return "__GNUC__" in macros and "__clang__" not in macros and "__x86_64__" in macros


pytestmark = pytest.mark.skipif(not is_gcc(), reason="needs GCC, for its report, on x86-64")


def flags() -> list[str]:
    """Those of setup.py that decide what may be vectorised."""
    found = re.search(r"^strict = (\[.*\])$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert found
    return ["-std=c++17", "-O3", *ast.literal_eval(found[1])]


def marked() -> set[tuple[str, int]]:
    """File and line of every loop after SFRON_INDEPENDENT."""
    lines = {
        p.relative_to(ROOT / "csrc").as_posix(): p.read_text().splitlines()
        for p in ROOT.glob("csrc/*/*.*")
    }
    after = [
        (name, i + 2)
        for name, text in lines.items()
        for i, line in enumerate(text)
        if line.strip() == MARK
    ]
    assert all(lines[name][i - 1].lstrip().startswith("for (") for name, i in after)
    return set(after)


MARK = "SFRON_INDEPENDENT"


def report(source: Path, *more: str) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """Lines of the loops that became vector code somewhere, and of those that did not somewhere."""
    command = [
        "g++",
        *flags(),
        *more,
        f"-I{ROOT / 'csrc'}",
        "-fopt-info-vec-all",
        "-c",
        str(source),
        "-o",
        "/dev/null",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    found: tuple[set[tuple[str, int]], set[tuple[str, int]]] = set(), set()
    for name, line, what in REPORT.findall(done.stderr):
        found[what.startswith("missed")].add((name, int(line)))
    return found


@pytest.mark.parametrize(
    "source", sorted(ROOT.glob("csrc/*/*_cpu.cpp")), ids=lambda path: path.stem
)
def test_no_marked_loop_is_scalar(source: Path) -> None:
    vector, scalar = report(source)
    assert vector & marked()
    assert not scalar & marked()


def test_the_report_tells(tmp_path: Path) -> None:
    """A choice between memory and memory, which depends on the loop before it, is what GCC cannot
    vectorise.
    """
    planted = tmp_path / "planted.cpp"
    text = (ROOT / "csrc/interpolate/interpolate_cpu.cpp").read_text()
    body = "slow[i] = fast[i] = interpolate_one(slow[i], fast[i], s);"
    assert body in text
    planted.write_text(text.replace(body, f'if (i % 3) {body} else asm volatile("");'))
    assert report(planted)[1] & marked()
