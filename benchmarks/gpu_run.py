"""`make gpu`: builds, tests, sanitizes and measures on a machine with a GPU, in under nine minutes, without a network.

Needs python3 with torch >= 2.11, setuptools, ninja, nvcc and g++; uses pytest, Triton, matplotlib and compute-sanitizer
where they are, and says what it skips where they are not. Steps are independent: each has its own time limit, and
those after a failed one still run. `$OUT` (default: build/gpu) receives summary.txt (a line for each step), log.txt
(all output), gpu.json, gpu.csv, two figures. The exit status is 0 if no step failed.
"""

import argparse
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
PER_OP = ("masked_grad_norm", "sgd_step", "adamw_step", "interpolate", "fisher_accumulate", "saliency_mask",
          "fisher_saliency_mask", "adaptive_cross_entropy", "adaptive_mse", "soft_target_kl", "hyper",
          "flat_ops")  # fmt: skip
PROBE = """
import torch
there = torch.cuda.is_available()
print(torch.__version__, "%d.%d" % torch.cuda.get_device_capability() if there else "-", end=" ")
print(torch.cuda.get_device_name() if there else "")
"""
WHEEL = """
import pathlib, torch, sfron_fast as sf
from sfron_fast import _native, ops
assert "@SITE@" in sf.__file__, sf.__file__
assert _native.available(), _native.reason()
for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
    p = torch.nn.Parameter(torch.ones(5000, device=device))
    p.grad = torch.full_like(p, 2.0)
    sf.SFRonSGD([p], lr=0.25).step()
    assert p.eq(0.5).all() and ops.kernel_for("sgd_step_", device) == "native", device
    print("a step on", device, "with torch", torch.__version__)
"""


@dataclass
class Step:
    """``command`` needs a GPU unless ``anywhere``; ``rehearsal`` stands in for it where there is none."""

    name: str
    limit: float  # seconds
    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    cwd: Path = ROOT
    rehearsal: list[str] | None = None
    anywhere: bool = False
    missing: str = ""  # why it cannot run at all


def has(python: str, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, cwd=ROOT).returncode == 0


def interpreter() -> str:
    """The python3 that runs this, or the checkout's own environment if only that has torch."""
    own = ROOT / ".venv/bin/python"
    return sys.executable if has(sys.executable, "torch") or not own.exists() else str(own)


def steps(python: str, capability: str, out: Path, scratch: Path) -> list[Step]:
    """In the order in which they matter, should the time run out."""
    cores = str(os.cpu_count() or 2)
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    tool = shutil.which("compute-sanitizer") or next(
        (p for folder in ("bin", "compute-sanitizer") if Path(p := f"{home}/{folder}/compute-sanitizer").exists()), None
    )
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-m", "long or not long"]
    if not has(python, "pytest"):  # the same ops by a short program
        note = "pytest is not installed; put its wheels on PYTHONPATH"
        gpu = Step("tests/gpu", 60, [python, "tests/gpu/sanitize.py"])
        per_op = Step("per-op tests", 0, [], missing=note)
    else:
        spread = ["-n", str(min(4, int(cores)))] if has(python, "xdist") else []
        files = [f"tests/test_{name}.py" for name in PER_OP]
        # one process: a test reads how much memory is free. The others select the device by its parameter's name.
        gpu = Step("tests/gpu", 130, [*pytest, "tests/gpu"])
        per_op = Step("per-op tests", 100, [*pytest, *spread, "-k", "cuda", *files])
    driver = [python, "tests/gpu/sanitize.py"]
    checked = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def sanitizer(name: str) -> Step:
        command = [str(tool), "--tool", name, "--error-exitcode", "9", *driver]
        missing = "" if tool else "compute-sanitizer is neither on PATH nor in CUDA_HOME"
        return Step(name, 75, command, checked, missing=missing, rehearsal=[*driver, "--rehearse"])

    bench = [python, "-m", "benchmarks.run", "--device", "cuda", "--out", str(out / "gpu")]
    make = [python, "setup.py", "build_ext"]
    build = {"USE_CUDA": "1", "SFRON_FAST_NATIVE": "require", "MAX_JOBS": cores,
             "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", capability)}  # fmt: skip
    return [
        Step("env", 30, ["sh", "-c", f"nvidia-smi; nvcc --version; '{python}' -m sfron_fast env"], anywhere=True),
        Step("build", 150, [*make, "--inplace", "--force"], build, build_root(python, scratch)),
        gpu,
        wheel(python, scratch, ROOT / "dist"),
        Step("benchmark", 190, [*bench, "--budget", "160"], rehearsal=[*bench, "--rehearse"]),
        per_op,
        sanitizer("memcheck"),
        sanitizer("racecheck"),
    ]


def build_root(python: str, scratch: Path) -> Path:
    """The checkout; for a setuptools that cannot read its pyproject.toml (< 77) a folder of links without that."""
    code = "import setuptools as s; assert int(s.__version__.split('.')[0]) >= 77"
    if subprocess.run([python, "-c", code], capture_output=True).returncode == 0:
        return ROOT
    folder = scratch / "checkout"
    folder.mkdir()
    for name in ("setup.py", "csrc", "sfron_fast"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def wheel(python: str, scratch: Path, dist: Path) -> Step:
    """A wheel built elsewhere, perhaps against another torch and Python, is loaded from a folder of its own."""
    found = sorted(glob.glob(str(dist / "*.whl")), key=os.path.getmtime)
    if not found:
        return Step("wheel", 0, [], missing="no wheel in dist/; build one elsewhere with USE_CUDA=1 and put it there")
    site = scratch / "site"
    code = f"import zipfile; zipfile.ZipFile({found[-1]!r}).extractall({str(site)!r})"
    run = f"'{python}' -c \"$UNPACK\" && PYTHONPATH='{site}':\"$PYTHONPATH\" '{python}' -c \"$USE\""
    env = {"UNPACK": code, "USE": WHEEL.replace("@SITE@", str(site)), "SFRON_FAST_NATIVE": "require"}
    return Step("wheel", 45, ["sh", "-c", run], env, cwd=scratch, anywhere=True)


class Summary:
    """A line for each step, on disk as soon as it is known."""

    def __init__(self, out: Path) -> None:
        self.path, self.lines, self.failed = out / "summary.txt", [], 0
        self.log = (out / "log.txt").open("w", buffering=1)

    def add(self, step: str, state: str, seconds: float, why: str = "") -> None:
        self.failed += state in ("FAILED", "TIMED OUT")
        self.lines.append(f"{step:14} {state:10} {seconds:6.1f} s  {why}".rstrip())
        self.path.write_text("\n".join(self.lines) + "\n")
        print(self.lines[-1], flush=True)

    def run(self, step: Step, command: list[str], limit: float, state: str, why: str = "") -> None:
        """One command in a process group of its own, so that what it started ends with it."""
        self.log.write(f"\n===== {step.name}: {' '.join(command)}\n")
        start, began = self.log.tell(), time.monotonic()
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **step.env}
        try:
            process = subprocess.Popen(command, cwd=step.cwd, env=env, stdout=self.log, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        except OSError as error:
            return self.add(step.name, "FAILED", 0.0, str(error))
        try:
            code = process.wait(limit)
            if code:
                state, why = "FAILED", f"exit status {code}"
        except subprocess.TimeoutExpired:
            state, why = "TIMED OUT", f"limit {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.log.flush()
        self.add(step.name, state, time.monotonic() - began, why)
        self.tail(start, 12 if state in ("ok", "rehearsed") else 40)
        return None

    def tail(self, start: int, count: int) -> None:
        with open(self.log.name, errors="replace") as file:
            file.seek(start)
            print("\n".join("    " + line.rstrip()[:200] for line in file.readlines()[-count:]), flush=True)


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
            summary.run(step, step.command, limit, "ok")
        elif step.rehearsal:
            summary.run(step, step.rehearsal, limit, "rehearsed", why)
        else:
            summary.add(step.name, "skipped", 0.0, NO_DEVICE)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build/gpu"))
    parser.add_argument("--seconds", type=float, default=520.0, help="for all steps together")
    parser.add_argument("--only", nargs="+", help="names of steps")
    options = parser.parse_args(arguments)
    began, out = time.monotonic(), options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    python = interpreter()
    found = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    if found.returncode:
        print(f"{python} cannot import torch: {found.stderr.strip()}\nrun `make gpu PYTHON=...` with one that can")
        return 1
    torch, capability, *device = found.stdout.split()
    print(f"{python}, torch {torch}, GPU: {' '.join(device) or 'none'}; log: {out / 'log.txt'}", flush=True)
    summary = Summary(out)
    with tempfile.TemporaryDirectory() as scratch:
        every = steps(python, capability, out, Path(scratch))
        chosen = [s for s in every if not options.only or s.name in options.only]
        run_all(chosen, summary, " ".join(device), options.seconds - (time.monotonic() - began))
    print(f"\n{summary.path}:\n" + summary.path.read_text(), end="")
    return int(summary.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
