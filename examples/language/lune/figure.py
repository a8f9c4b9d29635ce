"""What each arm has forgotten and kept."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ARMS = ("before", "LUNE", "LUNE, retain term", "all weights", "one refusal")
BARS = ("gone", "gone, held-out wordings", "retain", "relearnt")
COLOURS = ("#c1440e", "#e39a76", "#2b6777", "#8a9199")


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars: means over the seeds; dots: seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.5, 3.6), layout="constrained")
    for place, (bar, colour) in enumerate(zip(BARS, COLOURS, strict=True)):
        at = [number + 0.2 * (place - 1.5) for number in range(len(ARMS))]
        values = [[result["facts"]["arms"][arm][bar] for result in found] for arm in ARMS]
        label = "known again after relearning" if bar == "relearnt" else bar
        axes.bar(at, [sum(v) / len(v) for v in values], 0.18, color=colour, label=label)
        for x, seeds in zip(at, values, strict=True):
            axes.plot([x] * len(seeds), seeds, "o", color="#222222", markersize=2.5)
    floor = [result["facts"]["relearning floor"] for result in found]
    learnt_anew = sum(floor) / len(floor)
    label = "the same, of authors never learnt"
    axes.axhline(learnt_anew, color=COLOURS[3], linestyle=":", label=label)
    axes.set_xticks(range(len(ARMS)), ARMS)
    axes.set_ylabel("share of the questions")
    axes.set_ylim(0, 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
