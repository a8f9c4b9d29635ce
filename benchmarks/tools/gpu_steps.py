"""The steps of `make gpu`: what each part runs, within which limits, and what it needs."""

import glob
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIRST = ("every_op", "steps")  # of the files of tests that take a device
ELSEWHERE = ("in_place", "cross_entropy_sum")  # tests/gpu has these losses
BUDGET = "@BUDGET@"  # in a command: the seconds that are left, but for a case that has begun
WHEEL = """
import pathlib, torch, sfron_fast as sf
from sfron_fast.ops import native, registry as ops
assert "@SITE@" in sf.__file__, sf.__file__
assert native.available(), native.reason()
for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
    p = torch.nn.Parameter(torch.ones(5000, device=device))
    p.grad = torch.full_like(p, 2.0)
    sf.SFRonSGD([p], lr=0.25).step()
    assert p.eq(0.5).all() and ops.kernel_for("sgd_step_", device) == "native", device
    print("a step on", device, "with torch", torch.__version__)
"""


@dataclass
class Step:
    """``command`` needs a GPU unless ``anywhere``; where none is, ``rehearsal`` stands in."""

    name: str
    limit: float  # seconds
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path = ROOT
    rehearsal: list[str] | None = None
    anywhere: bool = False
    missing: str = ""  # why it cannot run at all


def has(python: str, module: str) -> bool:
    return (
        subprocess.run([python, "-c", f"import {module}"], capture_output=True, cwd=ROOT).returncode
        == 0
    )


def interpreter() -> str:
    """The python3 that runs this, or the checkout's own environment if only that has torch."""
    own = ROOT / ".venv/bin/python"
    return sys.executable if has(sys.executable, "torch") or not own.exists() else str(own)


def steps(python: str, capability: str, out: Path, scratch: Path, part: int) -> list[Step]:
    """Of one part, in the order in which they matter, should the time run out."""
    cores = str(os.cpu_count() or 2)
    environment = f"nvidia-smi; nvcc --version; '{python}' -m sfron_fast env"
    env = Step("env", 30, ["sh", "-c", environment], anywhere=True)
    precompile = [python, "tests/gpu/precompile.py", "--workers", cores, "--capability", capability]
    lacking = next(
        (
            f"{module} is not installed"
            for module in ("triton", "pytest")
            if not has(python, module)
        ),
        "",
    )
    compiled = Step("precompile", 90, precompile, missing=lacking)
    if part == 1:
        fresh = build(python, capability, scratch)
        return [env, fresh, compiled, gpu_tests(python), wheel(python, scratch, ROOT / "dist")]
    made = build(python, capability, scratch)
    if newer_than_sources(ROOT / "sfron_fast", ROOT / "csrc"):
        made = Step("build", 0, [], missing="the extension is newer than its sources")
    if part == 2:
        bench = [
            python,
            "-m",
            "benchmarks.run",
            "--device",
            "cuda",
            "--no-plots",
            "--out",
            str(out / "gpu"),
        ]
        timed = Step(
            "benchmark", 480, [*bench, "--budget", BUDGET], rehearsal=[*bench, "--rehearse"]
        )
        return [env, made, compiled, timed]
    return [
        env,
        made,
        compiled,
        sanitizer("memcheck", python),
        sanitizer("racecheck", python),
        per_op_tests(python),
    ]


def build(python: str, capability: str, scratch: Path) -> Step:
    options = {
        "USE_CUDA": "1",
        "SFRON_FAST_NATIVE": "require",
        "MAX_JOBS": str(os.cpu_count() or 2),
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", capability),
    }
    command = [python, "setup.py", "build_ext", "--inplace", "--force"]
    return Step("build", 180, command, options, build_root(python, scratch))


def newer_than_sources(package: Path, sources: Path) -> bool:
    built = [path.stat().st_mtime for path in package.glob("_C*.so")]
    return bool(built) and max(built) > max(path.stat().st_mtime for path in sources.rglob("*.*"))


def pytest_command(python: str) -> list[str]:
    """A line for each test, each failure in full at once, and the stacks of a test that hangs."""
    instead = "addopts=--strict-markers -v --tb=short -p benchmarks.tools.instant_failures"
    return [
        python,
        "-m",
        "pytest",
        "-o",
        instead,
        "-o",
        "faulthandler_timeout=60",
        "-p",
        "no:cacheprovider",
        "-m",
        "long or not long",
    ]


def gpu_tests(python: str) -> Step:
    """In one process, as a test reads what memory is free; without pytest a short program."""
    if has(python, "pytest"):
        return Step("tests/gpu", 250, [*pytest_command(python), "tests/gpu"])
    return Step("tests/gpu", 60, [python, "tests/gpu/sanitize.py"])


def per_op_tests(python: str) -> Step:
    """Tests that take a device, selected by the name that the parameter gives them."""
    if not has(python, "pytest"):
        return Step(
            "per-op tests", 0, [], missing="pytest is not installed; put its wheels on PYTHONPATH"
        )
    spread = ["-n", str(min(4, os.cpu_count() or 2))] if has(python, "xdist") else []
    command = [*pytest_command(python), *spread, "-k", "cuda", *device_tests()]
    return Step("per-op tests", 200, command)


def device_tests() -> list[str]:
    """Files with tests that take the fixture ``device``, but for what tests/gpu has."""
    names = {
        path.stem.removeprefix("test_"): str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").glob("*/test_*.py"))
        if re.search(r"^def test_\w+\((?:.*, )?device[,)]", path.read_text(), re.M)
    }
    rest = [name for name in names if name not in (*FIRST, *ELSEWHERE)]
    return [names[name] for name in (*FIRST, *rest)]


def sanitizer(name: str, python: str) -> Step:
    """compute-sanitizer over a short program.

    Calls that fail and are handled, as torch's are, are no finding.
    """
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer") or next(
        (
            p
            for folder in ("bin", "compute-sanitizer")
            if Path(p := f"{home}/{folder}/compute-sanitizer").exists()
        ),
        None,
    )
    driver = [python, "tests/gpu/sanitize.py"]
    quiet = ["--report-api-errors", "no"] if name == "memcheck" else []
    command = [str(tool), "--tool", name, *quiet, "--error-exitcode", "9", *driver]
    missing = "" if tool else "compute-sanitizer is neither on PATH nor in CUDA_HOME"
    options = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(name, 170, command, options, missing=missing, rehearsal=[*driver, "--rehearse"])


def build_root(python: str, scratch: Path) -> Path:
    """The checkout; for setuptools < 77, which cannot read its pyproject.toml, links without it."""
    code = "import setuptools as s; assert int(s.__version__.split('.')[0]) >= 77"
    if subprocess.run([python, "-c", code], capture_output=True).returncode == 0:
        return ROOT
    folder = scratch / "checkout"
    folder.mkdir()
    for name in ("setup.py", "csrc", "sfron_fast"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def wheel(python: str, scratch: Path, dist: Path) -> Step:
    """A wheel built elsewhere, perhaps for another torch and Python, loaded from its own folder."""
    found = sorted(glob.glob(str(dist / "*.whl")), key=os.path.getmtime)
    if not found:
        return Step(
            "wheel",
            0,
            [],
            missing="no wheel in dist/; build one elsewhere with USE_CUDA=1 and put it there",
        )
    site = scratch / "site"
    code = f"import zipfile; zipfile.ZipFile({found[-1]!r}).extractall({str(site)!r})"
    run = f"'{python}' -c \"$UNPACK\" && PYTHONPATH='{site}':\"$PYTHONPATH\" '{python}' -c \"$USE\""
    env = {
        "UNPACK": code,
        "USE": WHEEL.replace("@SITE@", str(site)),
        "SFRON_FAST_NATIVE": "require",
    }
    return Step("wheel", 45, ["sh", "-c", run], env, cwd=scratch, anywhere=True)
