"""What is forgotten and what is kept, step by step, and all marks of all arms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.systems.figures import bars, save

COLOURS = {
    "SIU": "#c1440e",
    "masks off": "#2b6777",
    "cross-entropy alone": "#d9a441",
    "GA": "#8a9199",
}
CURVES = {
    "forgotten": "forgotten, on unseen images",
    "specificity": "specificity: other digits named right",
}
BARS = ("forgotten", "specificity", "parity and size", "facts", "well-formed")


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Lines and bars are means of the seeds; dots are seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.5), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.7))
    for arm, colour in COLOURS.items():
        curves = [result["facts"]["curves"][arm] for result in found]
        for plot, (mark, label) in zip(axes, CURVES.items(), strict=False):
            seeds = [[step[mark] for step in curve] for curve in curves]
            mean = [sum(at) / len(at) for at in zip(*seeds, strict=True)]
            plot.plot(mean, color=colour, label=arm)
            for seed in seeds:
                plot.plot(seed, ".", color=colour, markersize=3)
            plot.set(xlabel="steps", ylabel=label, ylim=(-0.03, 1.03))
    for place, (arm, colour) in enumerate(COLOURS.items()):
        marks = [result["facts"]["arms"][arm] for result in found]
        values = [[mark[bar] for mark in marks] for bar in BARS]
        bars(axes[2], values, 0.18, 0.2 * (place - 1.5), colour=colour, dot=1.5)
    axes[2].set_xticks(range(len(BARS)), [bar.replace(" and ", "\nand ") for bar in BARS])
    axes[2].set(ylabel="share of the questions, last step", ylim=(0, 1.05))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4,
                  fontsize=8, frameon=False)  # fmt: skip
    save(figure, path)
