"""One picture: what is kept at what forgetting, how that decays, and the images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.systems.figures import save

COLOURS = {
    "SUGAR": "#c1440e",
    "elastic weights off": "#e39a76",
    "even pull": "#c9a227",
    "replay": "#2b6777",
    "mean extrapolation": "#222222",
    "mean extrapolation, at the mean": "#8a9199",
    "mean extrapolation, replay": "#7fb2bf",
}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Dots and lines are seeds; the images are the first seed's."""
    figure = Figure(figsize=(9.5, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2.2, 1.0))
    left = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    for number, seed in enumerate(found):
        together, one_by_one = seed["facts"]["at once"], seed["facts"]["one by one"]
        many = together[max(together, key=lambda count: len(together[count]))]
        for name, colour in COLOURS.items():
            if name in many:
                row = many[name]
                left.plot(row["likeness"], row["retain error"], "o", color=colour, markersize=5)
            if name in one_by_one:
                errors = [row["retain error"] for row in one_by_one[name]]
                steps = range(1, len(errors) + 1)
                label = name if number == 0 else None
                right.plot(steps, errors, "o-", color=colour, markersize=3, lw=1, label=label)
            elif number == 0:
                right.plot([], [], "o", color=colour, label=name)
    left.set(title="ten identities at once", xlabel="likeness of the forgotten to what they were")
    right.set(title="one after the other", xlabel="requests")
    left.set(yscale="log", ylabel="retain error")
    left.set_yticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
    left.minorticks_off()
    figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    shown = found[0]["facts"]["pictures"]
    for column, kind in enumerate(("forgotten", "retained")):
        axes = figure.add_subplot(grid[1, column])
        rows = [images(shown[name][kind]) for name in shown]
        axes.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=255)
        side = len(rows[0])
        axes.set_yticks([side * (0.5 + number) for number in range(len(rows))], list(shown))
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(kind)
    save(figure, path)


def images(text: str, count: int = 10) -> np.ndarray:
    """One row of square images, each in a white frame, from bytes in hexadecimal."""
    grey = np.frombuffer(bytes.fromhex(text), dtype=np.uint8)
    side = round((len(grey) / count) ** 0.5)
    framed = np.pad(grey.reshape(count, side, side), [(0, 0), (1, 1), (1, 1)], constant_values=255)
    return np.concatenate(framed, axis=1)
