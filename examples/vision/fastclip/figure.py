"""One picture: norms beside those of the matrices, and AMUN on a clipped and an unclipped model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.systems.figures import bars, save

COLOURS = {"norm": "#c1440e", "reshaped": "#3b6ea5"}
ARMS = {"unclipped": "#8a9199", "clipped": "#c1440e"}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Left: every layer of every seed. Right: bars are means of the seeds, dots are seeds."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
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
        values = [[seed["facts"]["arms"][arm]["gaps"][s] for seed in found] for s in stages]
        bars(right, values, 0.36, 0.38 * (number - 0.5), colour=colour, label=arm)
    right.set_xticks(range(len(stages)), ["before", "after AMUN"])
    right.set_ylabel("mean gap to Retrain of four measures")
    right.legend(frameon=False, fontsize=8)
    save(figure, path)
