"""`make gpu`: builds, tests, measures and sanitizes on a machine with a GPU, in parts of nine
minutes,
off the network.

`make gpu PART=1` builds and tests, `PART=2` measures, `PART=3` runs the sanitizers and the tests of
single ops; without PART all three, one after the other. Each part stands alone (2 and 3 build only
what is missing) and leaves what it knows at any moment, should it be killed. Needs python3 with
torch >= 2.11, setuptools, ninja, nvcc and g++; uses pytest, Triton and compute-sanitizer where they
are, and says what it skips where they are not. Steps are independent: each has its own time limit,
and those after a failed one still run.

`$OUT` (default: build/gpu) receives at most six files, flat, of at most 16 MB: summary.txt (a line
for each step), log-1.txt to log-3.txt (all output), gpu.json and gpu.csv, from which `python -m
benchmarks.plots gpu.json` draws the figures where matplotlib is. The exit status is 0 if no step
failed.
"""

import argparse
import contextlib
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NO_DEVICE = "no CUDA device"
PARTS = (1, 2, 3)
MOST_LOG = 5 << 20  # bytes that the log keeps of one step: its beginning and its end
PER_OP = (
    "every_op",
    "steps",
    "masked_grad_norm",
    "sgd_step",
    "adamw_step",
    "interpolate",
    "fisher_accumulate",
    "saliency_mask",
    "adaptive_cross_entropy",
    "adaptive_mse",
    "soft_target_kl",
    "tensor_settings",
    "flat_ops",
)
PROBE = """
import torch
there = torch.cuda.is_available()
print(torch.__version__, "%d.%d" % torch.cuda.get_device_capability() if there else "-", end=" ")
print(torch.cuda.get_device_name() if there else "")
"""
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
    """``command`` needs a GPU unless ``anywhere``; ``rehearsal`` stands in for it where there is
    none.
    """

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
    """A line for each test and each failure in full when it is known; stacks of a test that hangs."""
    instead = "addopts=--strict-markers -v --tb=short -p benchmarks.instant_failures"
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
    """In one process, as a test reads how much memory is free; without pytest the same ops by a
    short program.
    """
    if has(python, "pytest"):
        return Step("tests/gpu", 250, [*pytest_command(python), "tests/gpu"])
    return Step("tests/gpu", 60, [python, "tests/gpu/sanitize.py"])


def per_op_tests(python: str) -> Step:
    """Those of each op's own file that take a device, which select it by their parameter's name."""
    if not has(python, "pytest"):
        return Step(
            "per-op tests", 0, [], missing="pytest is not installed; put its wheels on PYTHONPATH"
        )
    spread = ["-n", str(min(4, os.cpu_count() or 2))] if has(python, "xdist") else []
    files = [str(path) for name in PER_OP for path in Path("tests").glob(f"*/test_{name}.py")]
    return Step("per-op tests", 200, [*pytest_command(python), *spread, "-k", "cuda", *files])


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
    """The checkout; for a setuptools that cannot read its pyproject.toml (< 77) a folder of links
    without that.
    """
    code = "import setuptools as s; assert int(s.__version__.split('.')[0]) >= 77"
    if subprocess.run([python, "-c", code], capture_output=True).returncode == 0:
        return ROOT
    folder = scratch / "checkout"
    folder.mkdir()
    for name in ("setup.py", "csrc", "sfron_fast"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def wheel(python: str, scratch: Path, dist: Path) -> Step:
    """A wheel built elsewhere, perhaps against another torch and Python, is loaded from a folder of
    its own.
    """
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


class Summary:
    """A line for each step of a part, on disk as soon as it is known; other parts' lines stay, with
    ``keep`` all.
    """

    def __init__(self, out: Path, part: int = 1, keep: bool = False) -> None:
        self.path, self.part, self.failed = out / "summary.txt", part, 0
        there = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = [line for line in there if keep or not line.startswith(f"{part} ")]
        self.log = (out / f"log-{part}.txt").open("a+b" if keep else "w+b", buffering=0)

    def add(self, step: str, state: str, seconds: float, why: str = "") -> None:
        self.failed += state in ("FAILED", "TIMED OUT")
        self.lines = [line for line in self.lines if not line.startswith(f"{self.part} {step:14} ")]
        self.lines.append(f"{self.part} {step:14} {state:10} {seconds:6.1f} s  {why}".rstrip())
        self.path.write_text("\n".join(sorted(self.lines, key=lambda line: line[0])) + "\n")
        print(self.lines[-1], flush=True)

    def run(self, step: Step, command: list[str], limit: float, state: str, why: str = "") -> None:
        """One command in a process group of its own, so that what it started ends with it."""
        self.log.write(f"\n===== {step.name}: {' '.join(command)}\n".encode())
        start, began = self.log.seek(0, os.SEEK_END), time.monotonic()
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **step.env}
        try:
            process = subprocess.Popen(
                command,
                cwd=step.cwd,
                env=env,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return self.add(step.name, "FAILED", 0.0, str(error))
        try:
            code = process.wait(limit)
            if code:
                state, why = "FAILED", f"exit status {code}"
        except subprocess.TimeoutExpired:
            state, why = "TIMED OUT", f"limit {limit:.0f} s"
        finally:
            end(process)
        self.shorten(start)
        self.add(step.name, state, time.monotonic() - began, why)
        self.tail(start, 12 if state in ("ok", "rehearsed") else 40)
        return None

    def shorten(self, start: int) -> None:
        """Of a step that wrote without end keep what tells most."""
        size = self.log.seek(0, os.SEEK_END) - start
        if size > MOST_LOG:
            self.log.seek(start + size - MOST_LOG // 2)
            last = self.log.read()
            self.log.truncate(start + MOST_LOG // 2)
            self.log.seek(0, os.SEEK_END)
            self.log.write(f"\n===== {size - MOST_LOG:,} bytes left out\n".encode() + last)

    def tail(self, start: int, count: int) -> None:
        self.log.seek(start)
        lines = self.log.read().decode(errors="replace").splitlines()
        print("\n".join("    " + line.rstrip()[:200] for line in lines[-count:]), flush=True)


def end(process: subprocess.Popen) -> None:
    """With all that it started: first as Ctrl-C would, so that it says how far it came."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(chosen: list[Step], summary: Summary, device: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    why = f"{NO_DEVICE}: on the CPU, proves and measures nothing"
    for step in chosen:
        left = end - time.monotonic()
        limit = min(step.limit, left)
        if step.missing and (device or not step.rehearsal):
            summary.add(step.name, "skipped", 0.0, step.missing)
        elif left < 10:
            summary.add(step.name, "skipped", 0.0, "the time is used up")
        elif device or step.anywhere:
            command = [word.replace(BUDGET, f"{max(limit - 30, 10):.0f}") for word in step.command]
            summary.run(step, command, limit, "ok")
        elif step.rehearsal:
            summary.run(step, step.rehearsal, limit, "rehearsed", why)
        else:
            summary.add(step.name, "skipped", 0.0, NO_DEVICE)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build/gpu")
    )
    parser.add_argument("--part", type=int, choices=PARTS, help="default: all, one after the other")
    parser.add_argument(
        "--seconds", type=float, default=520.0, help="for all steps of a part together"
    )
    parser.add_argument("--only", nargs="+", help="names of steps")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    python = interpreter()
    found = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    if found.returncode:
        print(
            f"{python} cannot import torch: {found.stderr.strip()}\nrun `make gpu PYTHON=...` with"
            " one that can"
        )
        return 1
    torch, capability, *device = found.stdout.split()
    print(f"{python}, torch {torch}, GPU: {' '.join(device) or 'none'}; results: {out}", flush=True)
    failed = 0
    for part in [options.part] if options.part else PARTS:
        began, summary = time.monotonic(), Summary(out, part, keep=options.only is not None)
        with tempfile.TemporaryDirectory() as scratch:
            every = steps(python, capability, out, Path(scratch), part)
            chosen = [s for s in every if not options.only or s.name in options.only]
            run_all(chosen, summary, " ".join(device), options.seconds - (time.monotonic() - began))
        failed += summary.failed
    print(f"\n{out / 'summary.txt'}:\n" + (out / "summary.txt").read_text(), end="")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
