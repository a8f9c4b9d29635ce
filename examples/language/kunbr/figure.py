"""One picture: what each arm still knows, and what comes back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.systems.figures import INK, bars, save

COLOURS = {"retain": "#8a9199", "forget": "#3b6ea5", "RTT": "#c1440e"}
NAMES = {"retain": "retain", "forget": "forget", "RTT": "forget, after the attack"}


def draw(found: Sequence[Mapping[str, Any]], path: Path, chance: float) -> None:
    """A group of bars an arm, the mean of the seeds; a dot a seed."""
    arms = list(found[0]["facts"]["rows"])
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for number, (key, colour) in enumerate(COLOURS.items()):
        values = [[seed["facts"]["rows"][arm][key] for seed in found] for arm in arms]
        bars(axes, values, 0.25, 0.27 * (number - 1), colour=colour, label=NAMES[key])
    axes.axhline(chance, color=INK, linewidth=0.8, linestyle=":", label="guessing")
    axes.set_xticks(range(len(arms)), [arm.replace(", ", ",\n") for arm in arms], fontsize=8)
    axes.set_ylabel("right among four answers")
    axes.set_ylim(0.0, 1.05)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    save(figure, path)
