"""What the comparison has to show, and a sign test of pairs; the bounds were there before the runs.

Figures are at guidance 1 where nothing else is said, means over base models and classes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Found = Mapping[str, Any]  # of one base model and class: "rows" by arm, "masks"
MET, MISS, NOT_SHOWN = "met", "MISS", "not shown"


class Gate(NamedTuple):
    """One thing to be shown of some arms."""

    name: str
    arms: Sequence[str]
    holds: Callable[[Sequence[Found]], bool]
    found: Callable[[Sequence[Found]], str]


def values(pairs: Sequence[Found], arm: str, key: str, w: str = "1") -> list[float]:
    """A figure of an arm, of each pair."""
    return [pair["rows"][arm][w][key] for pair in pairs]


def having(pairs: Sequence[Found], *arms: str) -> list[Found]:
    """Pairs with rows of all of these."""
    return [pair for pair in pairs if all(arm in pair["rows"] for arm in arms)]


def mean(numbers: Iterable[float]) -> float:
    every = list(numbers)
    return sum(every) / len(every)


def lost(row: Row) -> float:
    """Points that are missing to a model that has forgotten the class and knows all others: FA and
    100 - RA, over both guidances.
    """
    return mean(row[w]["fa"] + 100.0 - row[w]["ra"] for w in ("0", "1"))


def score(row: Row, base: Row) -> float:
    """What settings are chosen by: ``lost``, and a point for each .1 of distance above the base."""
    return lost(row) + 10.0 * max(0.0, row["1"]["fd"] - base["1"]["fd"])


class Sign(NamedTuple):
    """Of pairs: how often the first is lower, how often the second, how often both are alike."""

    lower: int
    higher: int
    alike: int

    @property
    def p(self) -> float:
        """Two-sided, of the pairs that differ; 1 if none does."""
        n, k = self.lower + self.higher, min(self.lower, self.higher)
        return min(1.0, 2.0 * sum(math.comb(n, i) for i in range(k + 1)) / 2.0**n)


def signs(first: Sequence[float], second: Sequence[float]) -> Sign:
    """Which of two figures of the same pairs is lower."""
    pairs = list(zip(first, second, strict=True))
    lower, higher = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
    return Sign(lower, higher, len(pairs) - lower - higher)


def bound(
    arm: str, key: str, low: float = -math.inf, high: float = math.inf, worst: bool = False
) -> Gate:
    """The mean of a figure, or its worst value, between two bounds."""
    name = {"fa": "FA", "ra": "RA", "fd": "FD", "real": "realism"}[key]
    of = (max if high < math.inf else min) if worst else mean
    said = f"<= {high:g}" if high < math.inf else f">= {low:g}"
    return Gate(
        f"{arm}: {'worst' if worst else 'mean'} {name} {said}",
        [arm],
        lambda pairs: low <= of(values(pairs, arm, key)) <= high,
        lambda pairs: f"{of(values(pairs, arm, key)):.2f}",
    )


def beside_retrain(arm: str, times: float) -> Gate:
    def ratio(pairs: Sequence[Found]) -> float:
        return mean(values(pairs, arm, "fd")) / mean(values(pairs, "Retrain", "fd"))

    return Gate(
        f"{arm}: FD <= {times:g} of Retrain's",
        [arm, "Retrain"],
        lambda pairs: ratio(pairs) <= times,
        lambda pairs: f"{ratio(pairs):.2f}",
    )


def cost(arm: str, most: float) -> Gate:
    """Of the CPU seconds of Retrain, the Fishers included."""

    def share(pairs: Sequence[Found]) -> float:
        both = ([pair["rows"][name]["seconds"] for pair in pairs] for name in (arm, "Retrain"))
        ours, theirs = map(sum, both)
        return ours / theirs

    return Gate(
        f"{arm}: CPU seconds with its Fishers <= 1/{1 / most:.0f} of Retrain's",
        [arm, "Retrain"],
        lambda pairs: share(pairs) <= most,
        lambda pairs: f"1/{1 / share(pairs):.1f}",
    )


def beats(arm: str, without: str) -> Gate:
    """Fewer points lost, paired, p < .05."""

    def compared(pairs: Sequence[Found]) -> Sign:
        both = ([lost(pair["rows"][name]) for pair in pairs] for name in (arm, without))
        return signs(*both)

    return Gate(
        f"{arm} loses fewer points than {without} (sign test, p < .05)",
        [arm, without],
        lambda pairs: compared(pairs).p < 0.05 and compared(pairs).lower > compared(pairs).higher,
        lambda pairs: (
            f"better {compared(pairs).lower}, worse {compared(pairs).higher}, alike"
            f" {compared(pairs).alike}, p {compared(pairs).p:.3g}"
        ),
    )


def back(pairs: Sequence[Found], arm: str, step: str, key: str = "fa") -> float:
    """A figure after so many steps of the attack."""
    return mean(pair["rows"][arm]["attack"][step][key] for pair in pairs)


def comes_back(arm: str, steps: Sequence[str], least: float) -> Gate:
    return Gate(
        f"{arm}: the attack brings FA back to >= {least:g} within {steps[-1]} steps",
        [arm],
        lambda pairs: max(back(pairs, arm, step) for step in steps) >= least,
        lambda pairs: f"{max(back(pairs, arm, step) for step in steps):.1f}",
    )


def stays_away(arm: str, step: str, most: float) -> Gate:
    return Gate(
        f"{arm}: FA <= {most:g} after an attack of {step} steps",
        [arm],
        lambda pairs: back(pairs, arm, step) <= most,
        lambda pairs: f"{back(pairs, arm, step):.2f}",
    )


def alike(least: float) -> Gate:
    def found(pairs: Sequence[Found]) -> float:
        return mean(pair["masks"]["overlap"] for pair in pairs)

    return Gate(
        f"masks of two noise seeds: overlap >= {least:g}",
        ["base"],
        lambda pairs: found(pairs) >= least,
        lambda pairs: f"{found(pairs):.3f}",
    )


def destroys(arm: str) -> Gate:
    """Wherever FA is below 25, RA must be below 80; where FA never falls so far it fails anyway."""

    def of(pairs: Sequence[Found]) -> list[float]:
        rows = [pair["rows"][arm]["1"] for pair in pairs]
        return [row["ra"] for row in rows if row["fa"] < 25.0]

    return Gate(
        f"{arm} must fail: RA < 80 once FA < 25",
        [arm],
        lambda pairs: all(ra < 80.0 for ra in of(pairs)),
        lambda pairs: f"FA < 25 on {len(of(pairs))} of {len(pairs)}, RA there {_range(of(pairs))}",
    )


def keeps_knowing(arm: str, least: float) -> Gate:
    gate = bound(arm, "fa", low=least)
    return gate._replace(name=f"{arm} must fail: mean FA >= {least:g}")


def unreal(arm: str) -> Gate:
    def of(pairs: Sequence[Found]) -> tuple[float, float]:
        return min(values(pairs, arm, "fd")), max(values(pairs, arm, "real"))

    return Gate(
        f"{arm} must fail: FD > 1.15 of Retrain's and realism < 50, everywhere",
        [arm, "Retrain"],
        lambda pairs: (
            of(pairs)[0] > 1.15 * max(values(pairs, "Retrain", "fd")) and of(pairs)[1] < 50.0
        ),
        lambda pairs: f"FD >= {of(pairs)[0]:.1f}, realism <= {of(pairs)[1]:.1f}",
    )


def _range(numbers: Sequence[float]) -> str:
    return f"{min(numbers):.1f} to {max(numbers):.1f}" if numbers else "-"


STEPS = ("100", "300", "1000")
EVERY = {
    "Base model": [
        bound("base", "fa", low=97.0),
        bound("base", "ra", low=98.0),
        bound("base", "fd", high=1.1),
    ],
    "SFR-on": [
        bound("SFR-on", "fa", high=2.0),
        bound("SFR-on", "fa", high=10.0, worst=True),
        bound("SFR-on", "ra", low=99.0),
        beside_retrain("SFR-on", 1.15),
        bound("SFR-on, 16 passes", "fa", high=5.0),
        bound("SFR-on, 16 passes", "ra", low=98.5),
        cost("SFR-on", 1.0 / 15.0),
        cost("SFR-on", 1.0 / 30.0),
        bound("SFR-on, ascent", "fa", high=15.0),
        bound("SFR-on, ascent", "ra", low=99.0),
        bound("SFR-on, ascent", "fd", high=1.0),
        alike(0.55),
    ],
    "Parts": [
        beats("SFR-on, ascent", "ascent, no slow step"),
        beats("SFR-on, ascent", "ascent, raw adaptive"),
    ],
    "Relearning": [
        comes_back("ESD", STEPS[:1], 50.0),
        comes_back("SFR-on, ascent", STEPS, 50.0),
        bound("DiMUM, 600 passes", "ra", low=98.0),
        stays_away("DiMUM, 600 passes", "1000", 5.0),
    ],
    "Controls": [
        keeps_knowing("fine-tuning", 95.0),
        keeps_knowing("ascent, gamma 3", 95.0),
        keeps_knowing("ascent, unconditional only", 99.5),
        keeps_knowing("SFR-on, EMA .9999", 95.0),
        destroys("gradient ascent, until forgotten"),
        unreal("noise"),
    ],
    "Added after the first four pairs": [comes_back("ESD, no retain steps", STEPS[:1], 50.0)],
}


def verdict(gate: Gate, pairs: Sequence[Found]) -> tuple[str, str]:
    """(met, MISS, or not shown where a pair lacks an arm; what was found)."""
    there = [pair for pair in pairs if all(_known(pair, arm) for arm in gate.arms)]
    if not there:
        return NOT_SHOWN, "-"
    found = gate.found(there)
    if len(there) < len(pairs):
        return NOT_SHOWN, f"{found} on {len(there)} of {len(pairs)}"
    return (MET if gate.holds(there) else MISS), found


def _known(pair: Found, arm: str) -> bool:
    return arm in pair["rows"] and (arm != "base" or "masks" in pair)
