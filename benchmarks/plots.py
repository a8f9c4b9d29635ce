"""Figures from a result of `benchmarks.run`: speed-up, bandwidth, memory, phases, cost by size.

`python -m benchmarks.plots RESULT.json` writes `RESULT_{speedup,roofline,memory,phases,sweep}.png`,
those it has data for, beside it; says so and succeeds where matplotlib is missing. A figure has a
message and at most ten bars; all arms of all cases are a table (benchmarks/readme.py).
"""

import json
import sys
from pathlib import Path
from typing import Any

from .harness import is_ours
from .rows import (
    HEADLINES,
    MODEL,
    Rows,
    by_case,
    fractions,
    is_rival,
    memory,
    phases,
    speedups,
    sweep,
    whole,
)

OURS, OTHER, AUTHORS = "#c1440e", "#6c7480", "#c9ced6"
COLOURS = {
    "forward": "#d5d8dc",
    "backward": "#aab0b8",
    "accumulation": "#7a5195",
    "mask build": "#003f5c",
    "mask": "#003f5c",
    "clip": "#7a5195",
    "update": "#ef5675",
    "interpolation": "#ffa600",
    "mask, clip and update": "#c1440e",
    "update and interpolation": "#e8743b",
}


def draw(result: Path) -> str:
    """Write the figures; returns what was done, or why not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return (
            f"no plots: {error}; `python -m benchmarks.plots {result}` draws them where matplotlib"
            " is installed"
        )
    content = json.loads(result.read_text())
    origin, rows = content["provenance"], content["rows"]
    where = (
        f"{origin.get('gpu', origin['device'])}, torch {origin['torch']}\n"
        f"commit {origin['commit']}, {origin['date']}"
    )
    if origin.get("rehearsal"):
        where = "REHEARSAL ON A CPU: MEANS NOTHING. " + where
    made = []
    shown = headlines(rows)
    for kind, values, figure in (
        ("speedup", speedups(shown), speedup),
        ("roofline", fractions(shown), bandwidth),
        ("memory", memory(rows), allocated),
        ("phases", phases(rows), lambda cycles: stacks(cycles, rows)),
        ("sweep", sweep(rows), curves),
    ):
        if values:
            target = result.with_name(f"{result.stem}_{kind}.png")
            drawn = figure(values)
            drawn.text(0.99, 0.99, where, fontsize=6, ha="right", va="top", color="#555555")
            drawn.savefig(target, dpi=120)
            made.append(str(target))
    return "plots: " + (", ".join(made) or "nothing to draw")


def headlines(rows: Rows) -> Rows:
    """Of the cases that the figures draw; where a result has none of them, of its first ten."""
    cases = by_case(rows)
    names = [case for case in HEADLINES if case in cases] or [c for c in cases if ": " not in c][
        :10
    ]
    return [row for name in names for row in cases[name]]


def _landscape(title: str, bars: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.7 + 0.4 * bars), layout="constrained")
    axes = figure.add_subplot()
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _rows_of(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)


def speedup(cases: dict[str, dict[str, float]]) -> Any:
    """A bar a case: the fastest other arm's time over ours; the authors' style as a mark."""
    best = {
        case: min((v for arm, v in arms.items() if not arm.startswith("authors")), default=None)
        for case, arms in cases.items()
    }
    best = {case: value for case, value in best.items() if value is not None}
    ahead = sum(value >= 1.0 for value in best.values())
    figure, axes = _landscape(
        f"As fast as the fastest other arm, or faster, in {ahead} of {len(best)} cases", len(best)
    )
    for at, (case, value) in enumerate(best.items()):
        axes.barh(at, value, color=OURS if value >= 1.0 else OTHER, height=0.6)
        axes.annotate(f"{value:.2f}x", (value, at), (4, 0), textcoords="offset points", va="center")
        authors = [v for arm, v in cases[case].items() if arm.startswith("authors")]
        axes.plot(authors[-1:], [at] * len(authors[-1:]), "D", color="#333333", markersize=5)
    for colour, label in ((OURS, "faster or level"), (OTHER, "slower")):
        axes.barh(0, 0, color=colour, label=f"best other arm's time over ours: {label}")
    axes.plot([], [], "D", color="#333333", markersize=5, label="authors' style over ours")
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_xscale("log")
    most = max(value for arms in cases.values() for value in arms.values())
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if t <= 1.5 * most]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks], fontsize=9)
    axes.minorticks_off()
    axes.set_xlim(0.5, 1.6 * most)
    _rows_of(axes, list(best))
    axes.legend(
        fontsize=8, loc="upper center", bbox_to_anchor=(0.35, -0.08), ncols=3, frameon=False
    )
    return figure


def bandwidth(cases: dict[str, dict[str, float]]) -> Any:
    """A bar a case: ours; the best other arm as a mark."""
    ours = {
        case: values[-1]
        for case, arms in cases.items()
        if (values := [v for arm, v in arms.items() if is_ours(arm)])
    }
    near = sum(value >= 0.9 for value in ours.values())
    figure, axes = _landscape(
        f"{near} of {len(ours)} cases run within a tenth of the memory's speed; the rest compute",
        len(ours),
    )
    for at, (case, value) in enumerate(ours.items()):
        axes.barh(at, value, color=OURS, height=0.6)
        others = [v for arm, v in cases[case].items() if not is_ours(arm)]
        best = max(others, default=0.0)
        axes.plot([best] if others else [], [at] if others else [], "o", color="#333333")
        end = max(value, best)
        end = 1.0 if 0.9 < end < 1.0 else end  # not across the line
        axes.annotate(f"{value:.2f}", (end, at), (8, 0), textcoords="offset points", va="center")
    axes.barh(0, 0, color=OURS, label="ours")
    axes.plot([], [], "o", color="#333333", label="best other arm")
    axes.axvline(1.0, color="black", linewidth=1.0)
    axes.set_xlim(0, 1.15)
    axes.set_xlabel(
        "least bytes over time, as a share of the probe's bandwidth (line: the probe)", fontsize=9
    )
    _rows_of(axes, list(ours))
    axes.legend(fontsize=8, loc="lower right", frameon=False)
    return figure


def allocated(cases: dict[str, dict[str, float]]) -> Any:
    """A bar an arm, in place and sum too."""
    names = [(case, arm, value) for case, arms in cases.items() for arm, value in arms.items()]
    figure, axes = _landscape("What one call allocates: in place, next to nothing", len(names))
    for at, (_, arm, value) in enumerate(names):
        axes.barh(at, value, color=OURS if arm.startswith("sfron_fast") else OTHER, height=0.6)
        text = f"{value:.0f} MiB" if value >= 1.0 else "< 0.1 MiB"
        axes.annotate(text, (value, at), (4, 0), textcoords="offset points", va="center")
    most = max(value for _, _, value in names) or 1.0
    axes.set_xlim(0, 1.2 * most)
    _rows_of(axes, [f"{case.partition(', alpha')[0]}: {arm}" for case, arm, _ in names])
    axes.set_xlabel("MiB at most", fontsize=9)
    for colour, label in ((OURS, "sfron_fast"), (OTHER, "others")):
        axes.barh(0, 0, color=colour, label=label)
    axes.legend(fontsize=8, loc="lower right", frameon=False)
    return figure


def stacks(cycles: dict[str, dict[str, dict[str, float]]], rows: Rows) -> Any:
    """A stack of phases for each arm of each cycle: its median ms, as in the table, divided as the
    phases are when each is timed apart.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 * len(cycles) + 0.9), layout="constrained")
    figure.suptitle(
        "In a whole cycle the model takes the time: a faster step saves a few per cent",
        fontsize=12,
        fontweight="bold",
        x=0.01,
        ha="left",
    )
    grid = figure.subplots(len(cycles), 1, squeeze=False)[:, 0]
    for axes, (cycle, arms) in zip(grid, cycles.items(), strict=True):
        order = [phase for phase in COLOURS if any(phase in found for found in arms.values())]
        totals = {arm: whole(rows, cycle, arm)["p50_ms"] for arm in arms}
        for at, (arm, found) in enumerate(arms.items()):
            left, apart = 0.0, sum(found.values())
            for phase in order:
                width = found.get(phase, 0.0) / apart * totals[arm]
                axes.barh(at, width, left=left, color=COLOURS[phase], height=0.7)
                left += width
            rest = sum(ms for phase, ms in found.items() if phase not in MODEL)
            text = f" {left:.1f} ms, beside the model {100 * rest / apart:.0f} %"
            axes.text(left, at, text, va="center", fontsize=7)
        for phase in order:
            axes.barh(0, 0, color=COLOURS[phase], label=phase)
        axes.set_yticks(range(len(arms)), list(arms), fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3 * max(totals.values()))
        axes.set_title(cycle, fontsize=8, loc="left")
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def curves(arms: dict[str, list[tuple[int, float]]]) -> Any:
    """Cost of a forget step by the number of weights, an arm a line."""
    best: dict[int, float] = {}
    for arm, points in arms.items():
        if is_rival(arm):
            best |= {n: min(cost, best.get(n, cost)) for n, cost in points}
    ours = [point for arm, points in arms.items() if is_ours(arm) for point in points]
    ahead = sum(cost < best.get(n, 0.0) for n, cost in ours)
    title = f"A forget step costs less than the fastest other arm's at {ahead} of {len(ours)} sizes"
    figure, axes = _landscape(title, 9)
    for arm, points in arms.items():
        style = {"color": OURS, "linewidth": 2.0} if is_ours(arm) else {"linewidth": 1.0}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=arm, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("weights", fontsize=8)
    axes.set_ylabel("ns a weight", fontsize=8)
    figure.legend(fontsize=8, loc="outside right center", frameon=False)
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(draw(Path(sys.argv[1])))
