"""`make gpu`: builds, tests, measures and sanitizes on a machine with a GPU.

Off the network, in parts of nine minutes: `make gpu PART=1` builds and tests, `PART=2` measures,
`PART=3` runs the sanitizers and the tests of single ops; without PART all three, one after the
other. Each part stands alone (2 and 3 build only what is missing) and leaves what it knows at any
moment, should it be killed. Needs python3 with torch >= 2.11, setuptools, ninja, nvcc and g++; uses
pytest, Triton and compute-sanitizer where they are, and says what it skips where they are not.
Steps are independent: each has its own time limit, and those after a failed one still run.

`$OUT` (default: build/gpu) receives at most six files, flat, of at most 16 MB: summary.txt (a line
for each step), log-1.txt to log-3.txt (all output), gpu.json and gpu.csv, from which `python -m
benchmarks.plots gpu.json` draws the figures where matplotlib is. The exit status is 0 if no step
failed.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .gpu_steps import BUDGET, ROOT, Step, interpreter, steps

NO_DEVICE = "no CUDA device"
PARTS = (1, 2, 3)
MOST_LOG = 5 << 20  # bytes that the log keeps of one step: its beginning and its end
PROBE = """
import torch
there = torch.cuda.is_available()
print(torch.__version__, "%d.%d" % torch.cuda.get_device_capability() if there else "-", end=" ")
print(torch.cuda.get_device_name() if there else "")
"""


class Summary:
    """A line for each step, on disk at once; other parts' lines stay, with ``keep`` all lines."""

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
