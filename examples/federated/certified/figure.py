"""One picture: what is left of the distance to the retrained weights, and accuracy under noise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.systems.figures import INK, bars, save

STEPS = {"ratio": "#3b6ea5", "sample weights": "#8a9199", "diagonal Fisher": "#c1440e"}
NAMES = {
    "ratio": "client weights",
    "accuracy retrained": "retrained",
    "accuracy measured": "noise: measured",
    "accuracy certified": "noise: certified",
}
ACCURACIES = {
    "accuracy retrained": INK,
    "accuracy measured": "#9dbad5",
    "accuracy certified": "#3b6ea5",
}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A dot a seed; bars are means of the seeds."""
    figure = Figure(figsize=(11.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    seeds = [result["facts"]["cases"] for result in found]
    cases = list(seeds[0])
    for axes, rows in ((left, STEPS), (right, ACCURACIES)):
        for number, (key, colour) in enumerate(rows.items()):
            values = [[seed[case][key] for seed in seeds] for case in cases]
            label, shift = NAMES.get(key, key), 0.27 * (number - 1)
            if axes is right:
                bars(axes, values, 0.25, shift, colour=colour, label=label, dot=2)
                continue
            # no bars, as nothing is zero on a logarithmic scale
            axes.plot([], [], "o", label=label, color=colour, markersize=5)
            for place, several in enumerate(values):
                at = [place + shift] * len(several)
                axes.plot(at, several, "o", color=colour, markersize=5)
        labels = [case.replace("Erdos-Renyi", "random").replace(", ", "\n") for case in cases]
        axes.set_xticks(range(len(cases)), labels, fontsize=8)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    left.axhline(0.05, color=INK, linewidth=0.8, linestyle=":")
    left.set_yscale("log")
    left.set_ylim(3e-3, 100)
    left.set_ylabel("distance to retrained, after by before")
    right.set_ylim(0, 1.15)
    right.set_ylabel("test accuracy after noise at epsilon 1")
    save(figure, path)
