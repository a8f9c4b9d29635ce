"""One picture: cosines by model, and what steps of several lengths forget and cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.systems.figures import INK, bars, save

COLOURS = {
    "decoded": "#c1440e",
    "pseudo-inverse": "#3b6ea5",
    "true gradient": INK,
    "random": "#8a9199",
}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars are means of the seeds with a dot a seed; lines are single seeds."""
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    cosines = [seed["facts"]["cosines"] for seed in found]
    models = list(cosines[0])
    for number, key in enumerate(("decoder", "pseudo-inverse")):
        values = [[each[model][key] for each in cosines] for model in models]
        colour = COLOURS["decoded" if key == "decoder" else key]
        bars(left, values, 0.36, 0.38 * (number - 0.5), colour=colour, label=key)
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
    save(figure, path)
