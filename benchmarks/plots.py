"""Figures from a result of `benchmarks.run`: bandwidth, speed-up, phases of a cycle, cost by size.

`python -m benchmarks.plots RESULT.json` writes `RESULT_{roofline,speedup,memory,phases,sweep}.png`,
those it has data for, beside it; says so and succeeds where matplotlib is missing.
"""

import json
import sys
from pathlib import Path
from typing import Any

from .cases.peers import PACKAGES
from .cases.step_cases import SWEEP
from .harness import is_ours

PROBE = "probe"
MODEL = ("forward", "backward")  # phases that are no work of an arm's
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
Rows = list[dict[str, Any]]


def by_case(rows: Rows) -> dict[str, Rows]:
    cases: dict[str, Rows] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def fractions(rows: Rows) -> dict[str, dict[str, float]]:
    """Case -> arm -> bandwidth over the copy's; bytes are the floor, so waste counts as time."""
    found = {}
    for case, arms in by_case(rows).items():
        probe = next((r for r in arms if r["arm"].startswith(PROBE)), None)
        if probe is not None:
            found[case] = {r["arm"]: probe["p50_ms"] / r["p50_ms"] for r in arms if r is not probe}
    return found


def speedups(rows: Rows) -> dict[str, dict[str, float]]:
    """Case -> other arm -> its time over ours; ours is the case's last arm."""
    found = {}
    for case, arms in by_case(rows).items():
        if is_ours(arms[-1]["arm"]):
            found[case] = {
                r["arm"]: r["p50_ms"] / arms[-1]["p50_ms"]
                for r in arms[:-1]
                if not (r["arm"].startswith(PROBE) or is_ours(r["arm"]))
            }
    return {case: bars for case, bars in found.items() if bars}


def kernels(rows: Rows) -> Rows:
    """The cases of one op or step: no sweep, no whole cycles."""
    cycles = {case.partition(": ")[0] for case in by_case(rows) if ": " in case}
    return [r for r in rows if not r["case"].startswith((SWEEP, *cycles))]


def telling(rows: Rows) -> Rows:
    """Of each case the probe, the authors', the fastest other (of packages all), and ours."""
    kept = []
    for case, (*others, last) in by_case(rows).items():
        probes = [r for r in others if r["arm"].startswith(PROBE)]
        authors = [r for r in others if r["arm"].startswith("authors")]
        rest = [r for r in others if r not in (*probes, *authors) and not is_ours(r["arm"])]
        told = len(rest) if case.endswith(PACKAGES) else 1
        kept += [*probes, *authors[-1:], *sorted(rest, key=lambda r: r["p50_ms"])[:told], last]
    return kept


def phases(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Cycle -> arm -> phase -> ms."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        cycle, _, phase = row["case"].partition(": ")
        if phase:
            found.setdefault(cycle, {}).setdefault(row["arm"], {})[phase] = row["p50_ms"]
    return found


def memory(rows: Rows) -> dict[str, dict[str, float]]:
    """Case -> arm -> MiB that one call allocates at most."""
    found = {
        case: {
            r["arm"]: r["peak_mb"]
            for r in arms
            if not r["arm"].startswith(PROBE) and r.get("peak_mb", -1.0) >= 0.0
        }
        for case, arms in by_case(rows).items()
    }
    return {case: bars for case, bars in found.items() if bars}


def sweep(rows: Rows) -> dict[str, list[tuple[int, float]]]:
    """Arm -> (weights, ns a weight)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["case"].startswith(SWEEP):
            weights = int(row["case"].removeprefix(SWEEP).split()[0].replace(",", ""))
            found.setdefault(row["arm"], []).append((weights, row["p50_ms"] * 1e6 / weights))
    return found


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
    origin = content["provenance"]
    where = (
        f"{origin.get('gpu', origin['device'])}, torch {origin['torch']}, {origin['commit']},"
        f" {origin['date']}"
    )
    if origin.get("rehearsal"):
        where = "REHEARSAL ON A CPU: MEANS NOTHING. " + where
    made = []
    ops = telling(kernels(content["rows"]))
    for kind, values, figure in (
        (
            "roofline",
            fractions(ops),
            lambda v: bars(v, "least bytes / time, as a share of the probe's bandwidth"),
        ),
        ("speedup", speedups(ops), lambda v: bars(v, "time of the other arm / ours")),
        ("memory", memory(ops), lambda v: bars(v, "MiB that one call allocates at most", None)),
        ("phases", phases(content["rows"]), stacks),
        ("sweep", sweep(content["rows"]), curves),
    ):
        if values:
            target = result.with_name(f"{result.stem}_{kind}.png")
            drawn = figure(values)
            drawn.suptitle(where, fontsize=7)
            drawn.savefig(target, dpi=120)
            made.append(str(target))
    return "plots: " + (", ".join(made) or "nothing to draw")


def bars(values: dict[str, dict[str, float]], label: str, line: float | None = 1.0) -> Any:
    """Horizontal bars, a group a case; ours in one colour, the authors' in the lightest grey."""
    from matplotlib.figure import Figure

    height = 0.19  # of a bar, inches
    figure = Figure(
        figsize=(10, 1.0 + height * sum(len(arms) + 1 for arms in values.values())),
        layout="constrained",
    )
    axes = figure.add_subplot()
    at, ticks = 0.0, []
    for arms in values.values():
        ticks.append(at + (len(arms) - 1) / 2)
        for arm, value in arms.items():
            colour = (
                "#c1440e" if is_ours(arm) else "#c9ced6" if arm.startswith("authors") else "#6c7480"
            )
            axes.barh(at, value, color=colour, height=0.9)
            text, place = f"{value:.2f}  {arm}", {"textcoords": "offset points", "va": "center"}
            axes.annotate(text, (value, at), (3, 0), **place, fontsize=6)
            at += 1
        at += 1
    if line is not None:
        axes.axvline(line, color="black", linewidth=0.8)
    axes.set_yticks(ticks, list(values), fontsize=8)
    axes.set_ylim(at - 1, -1)
    most = max(value for arms in values.values() for value in arms.values())
    if line is not None and most > 5:
        axes.set_xscale("log")
        axes.set_xlim(0.5, 4.0 * most)
    else:
        axes.set_xlim(0, 1.3 * most or 1.0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(label, fontsize=8)
    return figure


def stacks(cycles: dict[str, dict[str, dict[str, float]]]) -> Any:
    """A stack of phases for each arm of each cycle, in ms: coloured is the optimizer's share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.8 * len(cycles) + 0.6), layout="constrained")
    grid = figure.subplots(len(cycles), 1, squeeze=False)[:, 0]
    for axes, (cycle, arms) in zip(grid, cycles.items(), strict=True):
        order = [phase for phase in COLOURS if any(phase in found for found in arms.values())]
        for at, found in enumerate(arms.values()):
            left = 0.0
            for phase in order:
                axes.barh(at, found.get(phase, 0.0), left=left, color=COLOURS[phase], height=0.7)
                left += found.get(phase, 0.0)
            rest = sum(ms for phase, ms in found.items() if phase not in MODEL)
            axes.text(
                left, at, f" {left:.1f}, beside the model {rest:.1f}", va="center", fontsize=7
            )
        for phase in order:
            axes.barh(0, 0, color=COLOURS[phase], label=phase)
        axes.set_yticks(range(len(arms)), list(arms), fontsize=7)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * max(sum(found.values()) for found in arms.values()))
        axes.set_title(f"{cycle}, ms", fontsize=8, loc="left")
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def curves(arms: dict[str, list[tuple[int, float]]]) -> Any:
    """Cost of a forget step by the number of weights, an arm a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for arm, points in arms.items():
        style = {"color": "#c1440e", "linewidth": 2.0} if is_ours(arm) else {"linewidth": 1.0}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=arm, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("weights", fontsize=8)
    axes.set_ylabel("ns a weight", fontsize=8)
    axes.set_ylim(top=5.0 * axes.get_ylim()[1])  # room for the legend
    axes.legend(fontsize=7, loc="upper right")
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(draw(Path(sys.argv[1])))
