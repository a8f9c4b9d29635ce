"""One picture: what each arm still knows, and what comes back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"retain": "#8a9199", "forget": "#3b6ea5", "RTT": "#c1440e"}
NAMES = {"retain": "retain", "forget": "forget", "RTT": "forget, after the attack"}


def draw(found: Sequence[Mapping[str, Any]], path: Path, chance: float) -> None:
    """A group of bars an arm, the mean of the seeds; a dot a seed."""
    arms = list(found[0]["facts"]["rows"])
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for number, (key, colour) in enumerate(COLOURS.items()):
        places = [i + 0.27 * (number - 1) for i in range(len(arms))]
        values = [[seed["facts"]["rows"][arm][key] for seed in found] for arm in arms]
        means = [sum(v) / len(v) for v in values]
        axes.bar(places, means, 0.25, color=colour, label=NAMES[key])
        for place, several in zip(places, values, strict=True):
            axes.plot([place] * len(several), several, "o", color="#222222", markersize=3)
    axes.axhline(chance, color="#222222", linewidth=0.8, linestyle=":", label="guessing")
    axes.set_xticks(range(len(arms)), [arm.replace(", ", ",\n") for arm in arms], fontsize=8)
    axes.set_ylabel("right among four answers")
    axes.set_ylim(0.0, 1.05)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
