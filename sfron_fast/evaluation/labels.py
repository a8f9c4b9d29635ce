"""Where the labels of a figure go: each beside its point, in the place that covers least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

BESIDE = 14  # points; a label further off is joined to its point


def place_labels(
    figure: Figure,
    axes: Axes,
    labels: Sequence[tuple[str, float, float, str]],
    marks: Sequence[tuple[float, float]],
) -> None:
    """Write each label beside its point where it covers the fewest marks and other labels; a thin
    line leads to one that had to go further.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).draw()  # fixes the layout, so that sizes in pixels are known
    pixels = axes.transData.transform(marks)
    taken: list[Bbox] = []
    near = [(12, 0, "left"), (-12, 0, "right"), (0, 14, "center"), (0, -14, "center")]
    far = [
        (sx * dx, sy * dy, "left" if sx > 0 else "right")
        for dx, dy in ((10, 12), (22, 24), (40, 38))
        for sx in (1, -1)
        for sy in (1, -1)
    ]
    for text, x, y, colour in labels:
        best: tuple[float, Annotation, Bbox, tuple[int, int]] | None = None
        for dx, dy, side in near + far:
            note = axes.annotate(
                text,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=side,
                va="center",
                color=colour,
                weight="bold",
                zorder=7,
            )
            box = note.get_window_extent().padded(3)
            inside = (
                axes.bbox.containsx(box.x0)
                and axes.bbox.containsx(box.x1)
                and axes.bbox.containsy(box.y1)
            )
            cost = (
                0.02 * (abs(dx) + abs(dy))
                + 100 * box.count_overlaps(taken)
                + box.count_contains(pixels)
                + (0 if inside else 50)
            )
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, note, box, (dx, dy))
            else:
                note.remove()
        assert best is not None
        taken.append(best[2])
        if max(map(abs, best[3])) > BESIDE:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.9}
            axes.annotate(
                "", (x, y), best[3], textcoords="offset points", arrowprops=line, zorder=5
            )
