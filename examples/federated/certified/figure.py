"""One picture: what is left of the distance to the retrained weights, and accuracy under noise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DARK = "#222222"
STEPS = {"ratio": "#3b6ea5", "sample weights": "#8a9199", "diagonal Fisher": "#c1440e"}
NAMES = {
    "ratio": "client weights",
    "accuracy retrained": "retrained",
    "accuracy measured": "noise: measured",
    "accuracy certified": "noise: certified",
}
ACCURACIES = {
    "accuracy retrained": DARK,
    "accuracy measured": "#9dbad5",
    "accuracy certified": "#3b6ea5",
}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A dot a seed; bars are means of the seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4), layout="constrained")
    seeds = [result["facts"]["cases"] for result in found]
    cases = list(seeds[0])
    for axes, rows in ((left, STEPS), (right, ACCURACIES)):
        for number, (key, colour) in enumerate(rows.items()):
            places = [place + 0.27 * (number - 1) for place in range(len(cases))]
            values = [[seed[case][key] for seed in seeds] for case in cases]
            label = NAMES.get(key, key)
            style: dict[str, Any] = {"color": DARK, "markersize": 2}
            if axes is left:  # no bars, as nothing is zero on a logarithmic scale
                style = {"color": colour, "markersize": 5}
                axes.plot([], [], "o", label=label, **style)
            else:
                means = [sum(v) / len(v) for v in values]
                axes.bar(places, means, 0.25, color=colour, label=label)
            for place, several in zip(places, values, strict=True):
                axes.plot([place] * len(several), several, "o", **style)
        labels = [case.replace("Erdos-Renyi", "random").replace(", ", "\n") for case in cases]
        axes.set_xticks(range(len(cases)), labels, fontsize=8)
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
        axes.spines[["top", "right"]].set_visible(False)
    left.axhline(0.05, color=DARK, linewidth=0.8, linestyle=":")
    left.set_yscale("log")
    left.set_ylim(3e-3, 100)
    left.set_ylabel("distance to retrained, after by before")
    right.set_ylim(0, 1.15)
    right.set_ylabel("test accuracy after noise at epsilon 1")
    figure.savefig(path, dpi=150)
    plt.close(figure)
