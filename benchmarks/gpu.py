"""`python -m benchmarks.gpu`: the CUDA and Triton kernels against stock PyTorch, ratios from one run.

The first arm of a case copies as many bytes as the work must move at least; the last is this package. Times are
between CUDA events, on a cold cache, medians with p20 and p80, arms in both orders; arms are compared before they are
timed. What fails is noted and costs only itself. Results are written after every case. `--rehearse` runs the same code
on the CPU, with tiny lists: its figures mean nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import gpu_lists, gpu_rows, harness
from .gpu_lists import Case
from .gpu_timer import Clock, first_line, freed, time_arms
from .harness import Arm, Row


def interleaved(device: str, tiny: bool) -> list[Case]:
    """The cases, most important first: what the time does not reach is dropped from the end."""
    lists, rows = gpu_lists.cases(device, tiny), gpu_rows.cases(device, tiny)
    last = gpu_lists.compile_cases(device, tiny)
    return [*lists[:3], *rows[:2], *lists[3:8], *rows[2:4], *lists[8:], *rows[4:], *last]


class Run:
    """Rows and messages so far, and where they go."""

    def __init__(self, out: Path, origin: dict[str, Any], clock: Clock, device: str, scale: float) -> None:
        self.out, self.origin, self.clock, self.device, self.scale = out, origin, clock, device, scale
        self.rows: list[Row] = []
        self.messages: list[dict[str, str]] = []

    def note(self, case: str, arm: str, text: str) -> None:
        self.messages.append({"case": case, "arm": arm, "message": text})
        print(f"  {case}: {arm}: {text}", flush=True)

    def case(self, case: Case) -> None:
        began = time.perf_counter()
        try:
            with freed(self.device):
                rows = self.measured(case)
        except Exception as error:
            self.note(case.name, "", f"failed: {first_line(error)}")
            rows = []
        self.rows += rows
        if rows:
            harness.append_csv(rows, self.origin, self.out)
        self.write()
        print(f"{case.name}: {len(rows)} arms, {time.perf_counter() - began:.1f} s", flush=True)

    def write(self) -> None:
        harness.write_json(self.rows, self.origin, self.out, messages=self.messages)

    def measured(self, case: Case) -> list[Row]:
        """A function of its own, so that the arms are gone when the memory is given back."""
        made: list[Arm] = []
        for make in case.arms:
            try:
                made.append(make())
            except Exception as error:
                self.note(case.name, label(make), f"cannot be made: {first_line(error)}")
        note = lambda arm, text: self.note(case.name, arm, text)  # noqa: E731
        return time_arms(case.name, made, case.bytes, self.clock, case.seconds * self.scale, note, *self.rounds())

    def rounds(self) -> tuple[int, int]:
        return (7, 100) if self.device == "cuda" else (2, 2)

    def failures(self) -> list[dict[str, str]]:
        """Whole cases, and arms of this package; the others may lack what they need."""
        own = [m for m in self.messages if m["arm"] == "" or "ours" in m["arm"] or "sfron_fast" in m["arm"]]
        return [m for m in own if not m["message"].startswith(("skipped", "launches not counted"))]


def label(make: Callable[[], Arm]) -> str:
    """What an arm that could not be made would have been."""
    words = [getattr(make, "func", make).__name__, *(a for a in getattr(make, "args", ()) if isinstance(a, str))]
    return " ".join(words)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/gpu/gpu"), help="results go to OUT.json and OUT.csv")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--budget", type=float, default=170.0, help="seconds; cases beyond it are skipped")
    parser.add_argument("--scale", type=float, default=1.0, help="times the time spent on each case")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny: finds typos, measures nothing")
    parser.add_argument("--no-plots", action="store_true")
    chosen = parser.parse_args(arguments)
    began = time.perf_counter()
    if not chosen.rehearse and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device; --rehearse runs the same code on the CPU", file=sys.stderr)
        return 1
    device = "cpu" if chosen.rehearse else "cuda"
    origin = {**harness.provenance(), "rehearsal": True} if chosen.rehearse else harness.gpu_provenance()
    run = Run(chosen.out, origin, Clock(device), device, 0.0 if chosen.rehearse else chosen.scale)
    for case in interleaved(device, chosen.rehearse):
        if chosen.only not in case.name:
            continue
        if time.perf_counter() - began + case.needs > chosen.budget:
            run.note(case.name, "", f"skipped: too little is left of the budget of {chosen.budget:.0f} s")
            continue
        run.case(case)
    run.write()
    print("\n" + harness.show(run.rows))
    if chosen.rehearse:
        print("a rehearsal on the CPU: these figures mean nothing")
    if not chosen.no_plots:
        from . import plots

        print(plots.draw(chosen.out.with_suffix(".json")))
    for message in run.messages:
        print(f"note: {message['case']}: {message['arm']}: {message['message']}")
    return int(bool(run.failures()) or not run.rows)


if __name__ == "__main__":
    sys.exit(main())
