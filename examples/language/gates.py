"""What the comparison has to show, checked on its rows: PASS, FAIL, or NOT SHOWN."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from .arms import BUDGETS

Row = Mapping[str, float]
Rows = Mapping[str, Row]  # by arm, of one pair or the mean of several

LEAK, EXCESS, KEPT, ALIKE = 35.0, 0.08, 0.90, 0.05
RETURNS = 0.1  # by which quantisation brings p forget back, at least


class Gate(NamedTuple):
    """One thing to be shown of some arms."""

    name: str
    arms: Sequence[str]
    holds: Callable[[Rows], bool]
    found: Callable[[Rows], str]


def excess(rows: Rows, arm: str) -> float:
    """How much more of the forget set relearning brings back than it teaches Retrain."""
    return rows[arm]["relearnt"] - rows["Retrain"]["relearnt"]


def at(key: str, arm: str, low: float = -float("inf"), high: float = float("inf")) -> Gate:
    """A value of one arm between two bounds."""
    said = [f"{key} >= {low:g}"] if low > -float("inf") else []
    said += [f"{key} <= {high:g}"] if high < float("inf") else []
    return Gate(
        f"{arm}: {' and '.join(said)}",
        [arm],
        lambda rows: low <= rows[arm][key] <= high,
        lambda rows: f"{rows[arm][key]:.3f}",
    )


def leak(arm: str, most: float) -> Gate:
    return Gate(
        f"{arm}: privleak within +- {most:g}",
        [arm],
        lambda rows: abs(rows[arm]["privleak"]) <= most,
        lambda rows: f"{rows[arm]['privleak']:.1f}",
    )


def relearns(arm: str, too_much: bool = False) -> Gate:
    return Gate(
        f"{arm}: relearning excess over Retrain {'>' if too_much else '<='} {EXCESS:g}",
        [arm, "Retrain"],
        lambda rows: (excess(rows, arm) > EXCESS) == too_much,
        lambda rows: f"{excess(rows, arm):+.3f}",
    )


def nearer(than: str, by: float) -> Gate:
    """SFR-on's gap is smaller than another's by at least so much; negative = may be larger."""
    return Gate(
        f"SFR-on: gap at least {by:g} below {than}"
        if by > 0
        else f"SFR-on: within {-by:g} of {than}",
        ["SFR-on", than],
        lambda rows: rows[than]["gap"] - rows["SFR-on"]["gap"] >= by,
        lambda rows: f"{rows[than]['gap'] - rows['SFR-on']['gap']:+.3f}",
    )


def remembers(arm: str) -> Gate:
    return Gate(
        f"{arm} must fail: it still knows the forget set (privleak < -{LEAK:g})",
        [arm],
        lambda rows: rows[arm]["privleak"] < -LEAK,
        lambda rows: f"{rows[arm]['privleak']:.1f}",
    )


def useless(arm: str) -> Gate:
    return Gate(
        f"{arm} must fail: p retain < {KEPT:g}",
        [arm],
        lambda rows: rows[arm]["p retain"] < KEPT,
        lambda rows: f"{rows[arm]['p retain']:.3f}",
    )


def only_alike(arm: str) -> Gate:
    def holds(rows: Rows) -> bool:
        row = rows[arm]
        leaks = abs(row["privleak"]) > LEAK
        return row["p value"] >= ALIKE and leaks and row["p retain"] < KEPT

    return Gate(
        f"{arm} must pass KS (p >= {ALIKE:g}) and fail privleak (> {LEAK:g}) and p retain",
        [arm],
        holds,
        lambda rows: ", ".join(
            f"{key} {rows[arm][key]:.3g}" for key in ("p value", "privleak", "p retain")
        ),
    )


def overdone(arm: str) -> Gate:
    return Gate(
        f"{arm} must fail: it forgets too much (privleak > {LEAK:g})",
        [arm],
        lambda rows: rows[arm]["privleak"] > LEAK,
        lambda rows: f"{rows[arm]['privleak']:.1f}",
    )


def budgets() -> list[Gate]:
    arms = [f"SFR-on, budget {share}" for share in BUDGETS]
    spent = [at("spent", arm, 0.5, 1.25) for arm in arms]
    falls = Gate(
        "a larger budget forgets more (p forget falls)",
        arms,
        lambda rows: all(rows[a]["p forget"] > rows[b]["p forget"] for a, b in pairwise(arms)),
        lambda rows: ", ".join(f"{rows[arm]['p forget']:.3f}" for arm in arms),
    )
    return [*spent, falls]


def hides() -> Gate:
    arm = "hidden in four bits"
    return Gate(
        f"{arm}: int4 brings p forget back by {RETURNS:g}, and not Retrain's",
        [arm, "Retrain"],
        lambda rows: (
            rows[arm]["int4"] - rows[arm]["p forget"] >= RETURNS
            and rows["Retrain"]["int4"] - rows["Retrain"]["p forget"] < RETURNS
        ),
        lambda rows: ", ".join(
            f"{rows[name]['int4'] - rows[name]['p forget']:+.3f}" for name in (arm, "Retrain")
        ),
    )


FIXTURE = [
    at("p forget", "Full", low=0.95),
    at("ES", "Full", low=0.95),
    at("D", "Full", low=0.5),
    at("p forget", "Retrain", high=0.45),
    at("D", "second Retrain", high=0.15),
    at("gap", "second Retrain", high=0.03),
]
OURS = [
    at("gap", "SFR-on", high=0.08),
    at("gap", "SFR-on", high=0.05),
    at("p retain", "SFR-on", low=KEPT),
    leak("SFR-on", LEAK),
    leak("SFR-on", 15.0),
    relearns("SFR-on"),
    *(nearer(f"{name} {lr}", 0.05) for name in ("GradDiff", "NPO") for lr in ("3e-4", "1e-3")),
    *(nearer(f"{name} 1e-3, our ceiling", 0.02) for name in ("GradDiff", "NPO")),
    nearer("SimNPO 1e-3", -0.03),
]
CONTROLS = [
    *(remembers(arm) for arm in ("Full", "fine-tuning 1e-3", "IdkDPO 3e-4")),
    useless("GradDiff 1e-3"),
    *(only_alike(arm) for arm in ("NPO 3e-4", "GradDiff 3e-4")),
    overdone("SFR-on, shared moments"),
    relearns("RMU 1e-3", too_much=True),
    hides(),
]
EVERY = {"Fixture": FIXTURE, "SFR-on": OURS, "Controls": CONTROLS, "Budget": budgets()}


def verdict(gate: Gate, pairs: Mapping[int, Rows]) -> tuple[str, str]:
    """(PASS if it holds on every pair; FAIL if not on one; NOT SHOWN if an arm is missing on one,
    what was found on each).
    """
    there = {
        pair: rows
        for pair, rows in pairs.items()
        if all(_known(rows.get(arm)) for arm in gate.arms)
    }
    found = "; ".join(f"{pair}: {gate.found(rows)}" for pair, rows in there.items())
    if not all(gate.holds(rows) for rows in there.values()):
        return "FAIL", found
    if len(there) < len(pairs):
        return "NOT SHOWN", found
    return "PASS", found


def _known(row: Row | None) -> bool:
    return row is not None and "error" not in row
