"""One picture: how far from retrained models each is, and what the attack sees."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.systems.figures import INK, save

COLOURS = {
    "retrained again": "#8a9199",
    "TRW": "#c1440e",
    "TRW by rows": "#e0a07f",
    "rescaling": "#3b6ea5",
    "relabelling": "#222222",
    "uniform target": "#555555",
}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars are means of the seeds, each a mean over classes, with a dot a seed."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    facts = [seed["facts"] for seed in found]
    _bars(left, facts, "distance", "distance of the mean output from retrained models'")
    _line(left, sum(each["floor"] for each in facts) / len(facts), "between retrained models")
    _bars(right, facts, "share", "share taken for the nearest class")
    shares = [s for each in facts for c in each["classes"].values() for s in c["shares"]]
    _line(right, sum(shares) / len(shares), "retrained models")
    save(figure, path)


def _bars(axes: Axes, facts: Sequence[Mapping[str, Any]], key: str, title: str) -> None:
    values = [[each["means"][way][key] for each in facts] for way in COLOURS]
    places = range(len(COLOURS))
    axes.barh(places, [sum(v) / len(v) for v in values], color=list(COLOURS.values()))
    for place, several in zip(places, values, strict=True):
        axes.plot(several, [place] * len(several), "o", color="white", markeredgecolor=INK,
                  markersize=4)  # fmt: skip
    axes.set_yticks(places, list(COLOURS))
    axes.invert_yaxis()
    axes.set_xlabel(title)


def _line(axes: Axes, value: float, label: str) -> None:
    axes.axvline(value, color=INK, linewidth=1, linestyle="--", label=label)
    axes.legend(frameon=False, fontsize=8)
