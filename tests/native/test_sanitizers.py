"""The CPU kernels under address and UB sanitizers, at every instruction set of this machine."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    *["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    # as in setup.py: without them the harness and the kernels would not compute the same bits
    *["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"],
]

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("g++") is None,
    reason="needs g++ and its sanitizers on Linux",
)


@pytest.fixture(scope="module")
def harness() -> Path:
    """The harness, built once per content of csrc: objects in parallel, then linked."""
    sources = sorted([*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/*/*_cpu.cpp")])
    sources.append(ROOT / "tests/native/sanitize.cpp")
    inputs = [*sources, *sorted(ROOT.glob("csrc/*/*.h")), *sorted(ROOT.glob("tests/native/*.h"))]
    digest = hashlib.sha256(
        b"".join(p.read_bytes() for p in inputs) + " ".join(FLAGS).encode()
    ).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"sfron_fast_sanitize_{os.getuid()}_{digest}"
    program = folder / "sanitize"
    if not program.exists():
        own = folder / str(os.getpid())  # another run may be building too
        own.mkdir(parents=True, exist_ok=True)
        objects = [own / f"{s.stem}.o" for s in sources]
        builds = [
            subprocess.Popen(["g++", *FLAGS, f"-I{ROOT / 'csrc'}", "-c", str(s), "-o", str(o)])
            for s, o in zip(sources, objects, strict=True)
        ]
        assert all([build.wait() == 0 for build in builds])
        subprocess.run(["g++", *FLAGS, *map(str, objects), "-o", str(own / "sanitize")], check=True)
        (own / "sanitize").rename(program)
        shutil.rmtree(own)
    return program


def run(program: Path, *arguments: str, isa: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, *arguments],
        env={**os.environ, "SFRON_FAST_ISA": isa},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_clean(harness: Path, isa: str) -> None:
    result = run(harness, isa=isa)
    if "expected a level of this processor" in result.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "clean\n"


def test_planted_overrun_is_caught(harness: Path) -> None:
    result = run(harness, "--plant", "overrun")
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr


def test_planted_wrong_value_is_caught(harness: Path) -> None:
    result = run(harness, "--plant", "value")
    assert result.returncode != 0
    assert "MISMATCH interpolate" in result.stderr
