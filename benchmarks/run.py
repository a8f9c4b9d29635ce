"""`make bench` = `python -m benchmarks.run`: us against stock PyTorch and others, in one run.

The first arm of a case is a probe that moves as many bytes as the work must move at least; the last
is this package, through its public API. Arms are compared before they are timed, then run in turn,
in both orders; medians with p20 and p80. On a GPU: between CUDA events, on a cold cache. What fails
is noted and costs only itself. Results are written after every case. `--rehearse` runs the same
code on the CPU, with tiny lists: its figures mean nothing.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

# What a careful user sets: without it most of the time of a large tensor that stock torch makes is
# page faults. Read at the first allocation; THP_MEM_ALLOC_ENABLE=0 shows torch's default.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from sfron_fast.ops import native

from . import cases, end_to_end, harness
from .cases import list_cases, row_cases
from .harness import Arm, Case, Row
from .timer import Clock, Contest, first_line, freed, give_back

MODELS = ("ResNet-18", "decoder")
ROOM = 70 * 2**30  # bytes: the arms of every case, beside torch's own, on a GPU of 80 GB


def chosen_cases(kind: str, device: str, tiny: bool) -> list[Case]:
    """Most important first: what the time does not reach is dropped from the end."""
    lists, rows = list_cases.cases(kind, device, tiny), row_cases.cases(kind, device, tiny)
    last = [
        *list_cases.compile_cases(kind, device, tiny),
        *list_cases.peer_cases(kind, device, tiny),
    ]
    others = other_cases(kind, device, tiny)
    return [*lists[:3], *rows[:2], *lists[3:9], *rows[2:4], *lists[9:], *rows[4:], *others, *last]


def other_cases(kind: str, device: str, tiny: bool) -> list[Case]:
    """Of every other file of benchmarks/cases that has a function ``cases``, as a new op's has."""
    found: list[Case] = []
    for name in sorted(module.name for module in iter_modules(cases.__path__)):
        module = import_module(f"{cases.__name__}.{name}")
        if module not in (list_cases, row_cases) and hasattr(module, "cases"):
            found += module.cases(kind, device, tiny)
    return found


class Run:
    """Rows and messages so far, and where they go."""

    def __init__(
        self,
        out: Path,
        origin: dict[str, Any],
        clock: Clock,
        device: str,
        scale: float,
        limit: float = math.inf,
    ) -> None:
        self.out, self.origin, self.clock, self.device = out, origin, clock, device
        self.scale, self.limit = scale, limit
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
        self.write()
        print(f"{case.name}: {len(rows)} arms, {time.perf_counter() - began:.1f} s", flush=True)

    def whole(self, model: str, tiny: bool) -> None:
        """Cycles of a real model."""
        began = time.perf_counter()
        try:
            with freed(self.device):
                rows = end_to_end.measure(model, self.device, 2 if tiny else 7, tiny)
        except Exception as error:
            return self.note(model, "", f"failed: {first_line(error)}")
        self.rows += rows
        self.write()
        return print(f"{model}: whole cycles, {time.perf_counter() - began:.1f} s", flush=True)

    def write(self) -> None:
        harness.write_csv(self.rows, self.origin, self.out)
        harness.write_json(self.rows, self.origin, self.out, messages=self.messages)

    def measured(self, case: Case) -> list[Row]:
        """A function of its own, so that the arms are gone when the memory is given back."""
        groups, note = case.groups(self.limit), partial(self.note, case.name)
        if len(groups) != 1:
            wanted = (
                f"all arms at once would hold {case.together() / 2**30:.0f} GiB of"
                f" {self.limit / 2**30:.0f}"
            )
            if not groups:
                note("", f"skipped: {wanted}, and two of them are too many")
                return []
            note(
                "memory",
                f"{wanted}: timed in {len(groups)} groups, with the probe and ours in each",
            )
        contest = Contest(case.name, case.bytes, self.clock, note, *self.rounds())
        good: dict[int, Arm] = {}
        names: dict[int, str] = {}
        for turn, group in enumerate(groups):
            new = group if turn == 0 else group[1:-1]
            made = {i: arm for i in new if (arm := self.made(case, i)) is not None}
            agreeing = contest.agreeing(list(made.values()))
            good |= {i: arm for i, arm in made.items() if arm in agreeing}
            names |= {i: arm.name for i, arm in good.items()}
            contest.time(
                [good[i] for i in sorted(good)],
                case.seconds * self.scale * len(group) / len(case.arms),
            )
            del made, agreeing
            if turn + 1 < len(groups):
                # go on to the next group
                good = {i: arm for i, arm in good.items() if i in (0, group[-1])}
                give_back(self.device)
        return contest.rows([names[i] for i in sorted(names)])

    def made(self, case: Case, index: int) -> Arm | None:
        """One arm of a case; None if it cannot be made."""
        try:
            return case.arms[index]()
        except Exception as error:
            self.note(case.name, label(case.arms[index]), f"cannot be made: {first_line(error)}")
            return None

    def rounds(self) -> tuple[int, int]:
        return (7, 200) if self.scale > 0 else (2, 2)


def memory_limit(device: str) -> float:
    """Bytes that a case's arms may hold: on a GPU 0.9 of what is free, at most ``ROOM``."""
    return min(ROOM, 0.9 * torch.cuda.mem_get_info()[0]) if device == "cuda" else math.inf


def unmatched(only: str, names: list[str]) -> str:
    """What to say of an ``--only`` that no case's name contains: the nearest by words."""
    words = only.lower().replace(",", " ").split()

    def near(name: str) -> float:
        found = sum(word in name.lower() for word in words)
        return found + SequenceMatcher(None, only.lower(), name.lower()).ratio()

    nearest = "; ".join(sorted(names, key=near, reverse=True)[:3])
    return f"--only: expected a part of a case's name, found {only!r}; near: {nearest}; see --list"


def label(make: Callable[[], Arm]) -> str:
    """What an arm that could not be made would have been."""
    words = [
        getattr(make, "func", make).__name__,
        *(a for a in getattr(make, "args", ()) if isinstance(a, str)),
    ]
    return " ".join(words)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--out", type=Path, help="OUT.json and OUT.csv; default: build/bench/cpu or .../gpu"
    )
    parser.add_argument("--list", action="store_true", help="print the cases' names, and stop")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument(
        "--budget", type=float, default=600.0, help="seconds; cases beyond it are skipped"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="times the time spent on each case"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, tiny: finds typos, measures nothing"
    )
    parser.add_argument("--no-plots", action="store_true")
    chosen = parser.parse_args(arguments)
    began = time.perf_counter()
    torch.set_num_threads(chosen.threads)
    kind = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda" and not chosen.rehearse and not torch.cuda.is_available():
        print(
            "benchmarks.run: no CUDA device; --rehearse runs the same code on the CPU",
            file=sys.stderr,
        )
        return 1
    device = "cpu" if chosen.rehearse else kind
    # whole cycles early: no other case says what the rest is worth
    jobs: list[Case | str] = list(chosen_cases(kind, device, chosen.rehearse))
    jobs[3:3] = MODELS
    names = [job if isinstance(job, str) else job.name for job in jobs]
    if chosen.list:
        print("\n".join(names))
        return 0
    if not any(chosen.only in name for name in names):
        parser.error(unmatched(chosen.only, names))
    origin = harness.gpu_provenance() if device == "cuda" else harness.provenance()
    # not the committed results: to replace these, name them
    where = Path("build/rehearsal" if chosen.rehearse else "build/bench")
    out = chosen.out or where / ("gpu" if kind == "cuda" else "cpu")
    if chosen.rehearse:
        origin |= {"rehearsal": True}
    if not native.available():
        print(f"note: no native kernels ({native.reason()}); this times the reference")
    run = Run(
        out,
        origin,
        Clock(device),
        device,
        0.0 if chosen.rehearse else chosen.scale,
        memory_limit(device),
    )
    if not chosen.rehearse and origin["load"] > 0.5:
        # stock torch meets its threads once a tensor, this package once a list
        run.note(
            "all",
            "machine",
            f"busy (load {origin['load']}): favours us; measure again on a quiet one",
        )
    for job in jobs:
        name, needs = (job, 0.0) if isinstance(job, str) else (job.name, job.needs)
        if chosen.only not in name:
            continue
        if time.perf_counter() - began + needs > chosen.budget:
            run.note(
                name, "", f"skipped: too little is left of the budget of {chosen.budget:.0f} s"
            )
        elif isinstance(job, str):
            run.whole(job, chosen.rehearse)
        else:
            run.case(job)
    run.write()
    print("\n" + harness.show(run.rows))
    if chosen.rehearse:
        print("a rehearsal on the CPU: these figures mean nothing")
    if not chosen.no_plots:
        from . import plots

        print(plots.draw(out.with_suffix(".json")))
    for message in run.messages:
        print(f"note: {message['case']}: {message['arm']}: {message['message']}")
    return int(bool(harness.failures(run.messages)) or not run.rows)


if __name__ == "__main__":
    sys.exit(main())
