"""One picture: norms beside those of the matrices, and AMUN on a clipped and an unclipped model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"norm": "#c1440e", "reshaped": "#3b6ea5"}
ARMS = {"unclipped": "#8a9199", "clipped": "#c1440e"}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Left: every layer of every seed. Right: bars are means of the seeds, dots are seeds."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=(1, 1.2)
    )
    rows = [row for seed in found for row in seed["facts"]["layers"].values()]
    top = 1.1 * max(row["exact"] for row in rows)
    left.plot([0, top], [0, top], color="#8a9199", linewidth=0.8)
    names = {"norm": "from autograd", "reshaped": "of the reshaped kernel"}
    for key, colour in COLOURS.items():
        points = [(row["exact"], row[key]) for row in rows if key in row]
        left.plot(*zip(*points, strict=True), "o", color=colour, markersize=4, label=names[key])
    left.set(xlabel="norm of the dense matrix", ylabel="norm found", xlim=(0, top), ylim=(0, top))
    left.legend(frameon=False, fontsize=8)
    stages = ("before", "AMUN")
    for number, (arm, colour) in enumerate(ARMS.items()):
        places = [i + 0.38 * (number - 0.5) for i in range(len(stages))]
        values = [[seed["facts"]["arms"][arm]["gaps"][s] for seed in found] for s in stages]
        right.bar(places, [sum(v) / len(v) for v in values], 0.36, color=colour, label=arm)
        for place, seeds in zip(places, values, strict=True):
            right.plot([place] * len(seeds), seeds, "o", color="#222222", markersize=3)
    right.set_xticks(range(len(stages)), ["before", "after AMUN"])
    right.set_ylabel("mean gap to Retrain of four measures")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
