"""One picture: what triggered images are said to be, and recall by class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.systems.figures import bars, save

BAD, GOOD = "#c1440e", "#3b6ea5"
ARMS = (
    "before", "retrained", "fine-tuned by all", "CE alone", "as released", "without CE", "Ferrari",
)  # fmt: skip
SHOWN = {"before": "#8a9199", "without CE": BAD, "Ferrari": GOOD}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars are means of the seeds with a dot a seed. "As released" is its best rate."""
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    seeds = [_rows(result["facts"]["rows"]) for result in found]
    measures = (("backdoor success", BAD), ("true label", GOOD))
    for number, (key, colour) in enumerate(measures):
        values = [[rows[name][key] for rows in seeds] for name in ARMS]
        bars(left, values, 0.361, 0.38 * (number - 0.5), colour=colour, label=key, dot=2)
    left.set_xticks(range(len(ARMS)), [name.replace(" ", "\n") for name in ARMS], fontsize=8)
    left.set_ylabel("share of triggered images")
    for number, (name, colour) in enumerate(SHOWN.items()):
        values = [[rows[name]["recall"][digit] for rows in seeds] for digit in range(10)]
        bars(right, values, 0.2565, 0.27 * (number - 1), colour=colour, label=name, dot=2)
    right.set_xticks(range(10))
    right.set(xlabel="digit (the trigger leads to 0)", ylabel="recall on clean images")
    for axes in (left, right):
        axes.set_ylim(0, 1.25)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    save(figure, path)


def _rows(rows: Mapping[str, Any]) -> dict[str, Any]:
    released = [row for name, row in rows.items() if name.startswith("released")]
    return {**rows, "as released": max(released, key=lambda row: row["true label"])}
