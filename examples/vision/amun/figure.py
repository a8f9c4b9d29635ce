"""One picture: the membership attack on each model, and how far each is from Retrain."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from examples.systems.figures import INK, bars, save

ARMS = ("before", "FT", "RL", "AMUN", "noise", "noise, own rate")
COLOURS = ("#8a9199", "#3b6ea5", "#2b6777", "#c1440e", "#e39a76", "#e39a76")


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars: means over the seeds; dots: seeds."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    facts = [seed["facts"] for seed in found]
    for axes, zero, values in (
        (left, 0.5, [[f["rows"][arm]["AUC"] for f in facts] for arm in ARMS]),
        (right, 0.0, [[f["gaps"][arm] for f in facts] for arm in ARMS]),
    ):
        bars(axes, values, 0.62, colour=COLOURS, bottom=zero)
        axes.set_xticks(range(len(ARMS)), [arm.replace(", ", ",\n") for arm in ARMS], fontsize=8)
    retrained = sum(f["rows"]["retrained"]["AUC"] for f in facts) / len(facts)
    left.axhline(retrained, color=INK, linestyle=":", label="Retrain")
    left.set_ylabel("membership AUC (chance: 0.5)")
    left.legend(frameon=False, fontsize=8)
    right.set_ylabel("mean gap to Retrain of four measures")
    save(figure, path)
