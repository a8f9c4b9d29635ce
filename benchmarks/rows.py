"""What a result of `benchmarks.run` says: its rows by case, beside ours and beside the probe."""

from typing import Any

from .cases.step_cases import SWEEP
from .harness import is_ours

PROBE = "probe"
MODEL = ("forward", "backward")  # phases that are no work of an arm's

# what the README shows and the figures draw, wins and losses: a step of each kind, lists of many
# tensors, saliency, losses of many and of few classes
HEADLINES = (
    "ResNet-18 x 1.5, adamw forget",
    "ResNet-18 x 1.5, adamw pair, alpha 0.5",
    "ResNet-18 x 1.5, sgd forget",
    "ResNet-18 x 1.5, sgd plain",
    "10,000 x 64, adamw forget",
    "ResNet-18 x 1.5, Fisher accumulate",
    "ResNet-18 x 1.5, mask build",
    "cross-entropy 1,024 x 32,000 fp32",
    "cross-entropy 256 x 10 fp32",
    "soft-target KL 8,192 x 10 fp32",
)
# what the figure of memory draws
ALLOCATING = {
    "ResNet-18 x 1.5, adamw pair, alpha 0.5": (
        "authors' style",
        "stock, fused (bool mask)",
        "stock, fused (float mask, clip in the step)",
        "sfron_fast",
    ),
    "cross-entropy 1,024 x 32,000 fp32": (
        "eager torch",
        "torch.compile",
        "sfron_fast",
        "sfron_fast, in place",
        "sfron_fast, sum",
    ),
}
Rows = list[dict[str, Any]]


def is_rival(arm: str) -> bool:
    """Whether it is another's way of doing the work: neither the probe nor ours."""
    return not (arm.startswith(PROBE) or is_ours(arm))


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
                r["arm"]: r["p50_ms"] / arms[-1]["p50_ms"] for r in arms[:-1] if is_rival(r["arm"])
            }
    return {case: bars for case, bars in found.items() if bars}


def kernels(rows: Rows) -> Rows:
    """The cases of one op or step: no sweep, no whole cycles."""
    cycles = {case.partition(": ")[0] for case in by_case(rows) if ": " in case}
    return [r for r in rows if not r["case"].startswith((SWEEP, *cycles))]


def slower(rows: Rows) -> dict[tuple[str, str], float]:
    """(case, arm) -> its time over ours, of all that are faster than we, the sweep's too."""
    single = [r for r in rows if ": " not in r["case"]]
    return {
        (case, arm): value
        for case, arms in speedups(single).items()
        for arm, value in arms.items()
        if value < 1.0
    }


def phases(rows: Rows) -> dict[str, dict[str, dict[str, float]]]:
    """Cycle -> arm -> phase -> ms."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        cycle, _, phase = row["case"].partition(": ")
        if phase:
            found.setdefault(cycle, {}).setdefault(row["arm"], {})[phase] = row["p50_ms"]
    return found


def whole(rows: Rows, cycle: str, arm: str) -> dict[str, Any]:
    """The row of a cycle that was not timed phase by phase."""
    return next(r for r in rows if r["case"].startswith(f"{cycle} (") and r["arm"] == arm)


def memory(rows: Rows) -> dict[str, dict[str, float]]:
    """Case -> arm -> MiB that one call allocates at most, of ``ALLOCATING``."""
    found = {}
    for case, shown in ALLOCATING.items():
        peaks = {r["arm"]: r.get("peak_mb", -1.0) for r in rows if r["case"] == case}
        found[case] = {arm: peaks[arm] for arm in shown if peaks.get(arm, -1.0) >= 0.0}
    return {case: bars for case, bars in found.items() if bars}


def sweep(rows: Rows) -> dict[str, list[tuple[int, float]]]:
    """Arm -> (weights, ns a weight)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["case"].startswith(SWEEP):
            weights = int(row["case"].removeprefix(SWEEP).split()[0].replace(",", ""))
            found.setdefault(row["arm"], []).append((weights, row["p50_ms"] * 1e6 / weights))
    return found
