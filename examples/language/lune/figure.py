"""What each arm has forgotten and kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.systems.figures import bars, save

ARMS = ("before", "LUNE", "LUNE, retain term", "all weights", "one refusal")
BARS = ("gone", "gone, held-out wordings", "retain", "relearnt")
COLOURS = ("#c1440e", "#e39a76", "#2b6777", "#8a9199")


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars: means over the seeds; dots: seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (bar, colour) in enumerate(zip(BARS, COLOURS, strict=True)):
        values = [[result["facts"]["arms"][arm][bar] for result in found] for arm in ARMS]
        label = "known again after relearning" if bar == "relearnt" else bar
        bars(axes, values, 0.18, 0.2 * (place - 1.5), colour=colour, label=label, dot=2.5)
    floor = [result["facts"]["relearning floor"] for result in found]
    learnt_anew = sum(floor) / len(floor)
    label = "the same, of authors never learnt"
    axes.axhline(learnt_anew, color=COLOURS[3], linestyle=":", label=label)
    axes.set_xticks(range(len(ARMS)), ARMS)
    axes.set_ylabel("share of the questions")
    axes.set_ylim(0, 1.05)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    save(figure, path)
