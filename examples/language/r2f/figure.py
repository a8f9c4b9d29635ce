"""One picture: cosines by model, and what steps of several lengths forget and cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "decoded": "#c1440e",
    "pseudo-inverse": "#3b6ea5",
    "true gradient": "#222222",
    "random": "#8a9199",
}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars are means of the seeds with a dot a seed; lines are single seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    cosines = [seed["facts"]["cosines"] for seed in found]
    models = list(cosines[0])
    for number, key in enumerate(("decoder", "pseudo-inverse")):
        places = [i + 0.38 * (number - 0.5) for i in range(len(models))]
        values = [[each[model][key] for each in cosines] for model in models]
        colour = COLOURS["decoded" if key == "decoder" else key]
        left.bar(places, [sum(v) / len(v) for v in values], 0.36, color=colour, label=key)
        for place, several in zip(places, values, strict=True):
            left.plot([place] * len(several), several, "o", color="#222222", markersize=3)
    left.set_xticks(range(len(models)), models)
    left.set_ylabel("cosine with the true gradient")
    left.legend(frameon=False, fontsize=8)
    for number, seed in enumerate(found):
        rows = seed["facts"]["rows"]
        for name, colour in COLOURS.items():
            points = [rows["before"], *rows[name].values()]
            right.plot(
                [point["forget"] for point in points],
                [point["retain loss"] for point in points],
                "o-",
                color=colour,
                markersize=3,
                linewidth=1,
                label=name if number == 0 else None,
            )
    right.set(xlabel="forget accuracy after one step", ylabel="retain loss")
    right.set_yscale("log")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
