"""What the pictures of the demonstrations share: bars of means with a dot a seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

INK = "#222222"


def bars(
    axes: Any,
    values: Sequence[Sequence[float]],
    width: float,
    shift: float = 0.0,
    *,
    colour: Any,
    label: str | None = None,
    bottom: float = 0.0,
    dot: float = 3.0,
) -> None:
    """One kind of bar in each place 0, 1, ...

    Args:
        values: of each place and seed; a bar is the mean of its seeds, a dot one of them.
        shift: of all places, to set several kinds side by side.
        colour: of all bars, or one for each place.
        bottom: where bars begin.
        dot: diameter of a dot, in points.
    """
    places = [place + shift for place in range(len(values))]
    heights = [sum(seeds) / len(seeds) - bottom for seeds in values]
    axes.bar(places, heights, width, bottom=bottom, color=colour, label=label)
    for place, seeds in zip(places, values, strict=True):
        axes.plot([place] * len(seeds), seeds, "o", color=INK, markersize=dot)


def save(figure: Any, path: Path) -> None:
    """Without the upper and the right line of each frame."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
