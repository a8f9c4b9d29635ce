"""What head and loss in one cost beside all logits: `python -m benchmarks.heads`, about half an
hour on two quiet cores.

Mean cross-entropy from hidden states, forward and backward, as `benchmarks/cases/linear_cases.py`
has it; all arms of a case in turn, in random order, medians of at least seven rounds. Scratch: what
torch's allocator holds at most during a call, less the gradients that the call leaves behind. In
the "logp" arm any loss of the log-probabilities may follow (the backward pass makes the logits
again); the last one weighs samples by their own losses, in one pass, in a workspace of 256 MiB.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from .cases import linear_cases
from .harness import Row, provenance
from .run import Run
from .timer import Clock, freed

RESULT = Path(__file__).parent / "results" / "heads.md"
FULL, LOGP, OURS = "full logits", "sfron_fast, logp", "sfron_fast"
Shape = tuple[int, int, int, object, bool]


class Measured(NamedTuple):
    """A case and what its arms took."""

    shape: Shape
    rows: dict[str, Row]

    def scratch(self, arm: str) -> float:
        """MiB beyond the gradients."""
        rows, features, classes, dtype, frozen = self.shape
        numbers = rows * features + (0 if frozen else classes * features)
        size = 4 if dtype == linear_cases.FP32 else 2
        return self.rows[arm].peak_mb - numbers * size / 2**20

    def over(self, arm: str, other: float) -> float:
        return self.rows[arm].p50_ms / other


class Goal(NamedTuple):
    """What was wanted of an arm, before anything was measured."""

    wanted: str
    limit: float
    found: Callable[[list[Measured], str], float]


def over_full(index: int) -> Callable[[list[Measured], str], float]:
    return lambda cases, arm: cases[index].over(arm, cases[index].rows[FULL].p50_ms)


GOALS = [
    Goal("H 256, V 131,072, fp32: time over full logits", 1.0, over_full(0)),
    Goal("H 256, V 131,072, fp32: scratch, MiB", 24.0, lambda cases, arm: cases[0].scratch(arm)),
    Goal("H 1,024, V 32,000, fp32: time over full logits", 1.25, over_full(1)),
    Goal("H 1,024, V 32,000, fp32, frozen: time over full logits", 1.6, over_full(2)),
    Goal(
        "H 1,024, V 32,000: bf16's time over fp32's",
        1.5,
        lambda cases, arm: cases[3].over(arm, cases[1].rows[arm].p50_ms),
    ),
]


def table(cases: dict[str, Measured]) -> list[str]:
    """A row for each arm."""
    lines = [
        "| case | arm | ms | p20 | p80 | over full logits | peak, MiB | scratch, MiB |",
        "| --- | --- |" + " ---: |" * 6,
    ]
    for name, case in cases.items():
        for arm, row in case.rows.items():
            times = f"{row.p50_ms:,.0f} | {row.p20_ms:,.0f} | {row.p80_ms:,.0f}"
            over = case.over(arm, case.rows[FULL].p50_ms)
            memory = f"{row.peak_mb:,.0f} | {case.scratch(arm):,.0f}"
            lines.append(f"| {name} | {arm} | {times} | {over:.2f}x | {memory} |")
    return lines


def goals(cases: list[Measured]) -> list[str]:
    """What was wanted, what both arms of this package do, and whether that is it."""
    lines = [
        "| wanted | at most | logp | | one pass | |",
        "| --- | ---: | ---: | --- | ---: | --- |",
    ]
    for goal in GOALS:
        cells = []
        for arm in (LOGP, OURS):
            found = goal.found(cases, arm)
            cells.append(f"{found:.2f} | {'met' if found <= goal.limit else '**missed**'}")
        lines.append(f"| {goal.wanted} | {goal.limit:g} | {' | '.join(cells)} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--rehearse", action="store_true", help="tiny: figures mean nothing")
    chosen = parser.parse_args(arguments)
    origin, tiny = provenance(), chosen.rehearse
    run = Run(chosen.out, origin, Clock("cpu"), "cpu", 0.0 if tiny else 1.0)
    # a rehearsal has no case of H 256
    shapes = [linear_cases.TINY[0], *linear_cases.TINY] if tiny else linear_cases.CPU
    cases = {}
    for shape in shapes:
        case = linear_cases.case(*shape, device="cpu", tiny=tiny)
        with freed("cpu"):
            rows = {row.arm: row for row in run.measured(case)}
        cases[f"{len(cases) + 1}. {case.name.removeprefix('head ')}"] = Measured(shape, rows)
        print(*(f"{arm}: {row.p50_ms:,.0f} ms" for arm, row in rows.items()), sep="\n", flush=True)
    told = ", ".join(
        f"{k} {origin[k]}" for k in ("device", "isa", "threads", "load", "torch", "commit", "date")
    )
    left_out = [f"- {m['case']}: {m['arm']}: {m['message']}" for m in run.messages]
    lines = ["# Head and loss in one", "", str(__doc__).split("\n\n", 1)[1].strip(), ""]
    lines += [*goals(list(cases.values())), "", *table(cases), "", *left_out, "", told, ""]
    chosen.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
