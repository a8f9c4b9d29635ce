"""Bars from a result of `benchmarks.gpu`: share of the copy's bandwidth, and speed-up over the other arms.

`python -m benchmarks.plots RESULT.json` writes `RESULT_roofline.png` and `RESULT_speedup.png` beside it; says so and
succeeds where matplotlib is missing.
"""

import json
import sys
from pathlib import Path
from typing import Any

OURS, PROBE = "sfron_fast", "probe"
Rows = list[dict[str, Any]]


def by_case(rows: Rows) -> dict[str, Rows]:
    cases: dict[str, Rows] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases


def fractions(rows: Rows) -> dict[str, dict[str, float]]:
    """Case -> arm -> bandwidth over that of the same case's copy; the bytes are the floor, so waste counts as time."""
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
        if arms[-1]["arm"].startswith(OURS):
            found[case] = {r["arm"]: r["p50_ms"] / arms[-1]["p50_ms"] for r in arms[:-1]
                           if not r["arm"].startswith((PROBE, OURS))}  # fmt: skip
    return {case: bars for case, bars in found.items() if bars}


def draw(result: Path) -> str:
    """Write both figures; returns what was done, or why not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return f"no plots: {error}; `python -m benchmarks.plots {result}` draws them where matplotlib is installed"
    content = json.loads(result.read_text())
    origin = content["provenance"]
    where = f"{origin.get('gpu', origin['device'])}, torch {origin['torch']}, {origin['commit']}, {origin['date']}"
    if origin.get("rehearsal"):
        where = "REHEARSAL ON A CPU: MEANS NOTHING. " + where
    made = []
    for kind, values, label, line in (
        ("roofline", fractions(content["rows"]), "least bytes / time, as a share of the copy's bandwidth", 1.0),
        ("speedup", speedups(content["rows"]), "time of the other arm / ours", 1.0),
    ):
        if values:
            target = result.with_name(f"{result.stem}_{kind}.png")
            bars(values, label, line, where, target)
            made.append(str(target))
    return "plots: " + (", ".join(made) or "nothing to draw")


def bars(values: dict[str, dict[str, float]], label: str, line: float, where: str, target: Path) -> None:
    """Horizontal bars, a group for each case; our arms in one colour, all others in greys."""
    from matplotlib.figure import Figure

    count = sum(len(arms) + 1 for arms in values.values())
    figure = Figure(figsize=(10, 1.2 + 0.22 * count), layout="constrained")
    axes = figure.add_subplot()
    at, ticks, names = 0.0, [], []
    for case, arms in values.items():
        axes.text(0.0, at, case, va="center", fontsize=8, fontweight="bold", transform=axes.get_yaxis_transform())
        at += 1
        for arm, value in arms.items():
            axes.barh(at, value, color="#c1440e" if arm.startswith(OURS) else "#8a8f98", height=0.8)
            axes.text(value, at, f" {value:.2f}", va="center", fontsize=7)
            ticks.append(at)
            names.append(arm)
            at += 1
    axes.axvline(line, color="black", linewidth=0.8)
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set_ylim(at, -1)
    if max(value for arms in values.values() for value in arms.values()) > 5:
        axes.set_xscale("log")
    axes.set_xlabel(label, fontsize=8)
    axes.set_title(where, fontsize=7)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(draw(Path(sys.argv[1])))
