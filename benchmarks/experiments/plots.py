"""The experiment's own figures, beside `sfron_fast.evaluation.figures`: bars and sweeps."""

from collections.abc import Mapping, Sequence
from typing import Any

from sfron_fast.evaluation.figures import GRID, INK, _bars, _figure


def bars(values: Mapping[str, tuple[float, float]], label: str) -> Any:
    """{method: (mean, standard deviation)} as bars from the top, best first."""
    ordered = dict(sorted(values.items(), key=lambda item: item[1][0]))
    figure, axes = _bars(ordered, lambda method: f"{ordered[method][0]:.2f}", 0.36)
    axes.set_xlim(0, 1.15 * max(m + s for m, s in ordered.values()) or 1.0)
    axes.set_xlabel(label)
    return figure


def sweep(
    name: str, points: Sequence[tuple[float, Mapping[str, float]]], reference: Mapping[str, float]
) -> Any:
    """FA and RA (percent, Retrain's dashed) and Avg.D by one setting: (value, mean metrics)."""
    figure, axes = _figure(4.6, 3.2)
    x, lines = range(len(points)), {"FA": "#D55E00", "RA": "#0072B2", "Avg.D": INK}
    for metric, colour in lines.items():
        axes.plot(
            x, [metrics[metric] for _, metrics in points], color=colour, marker="o", markersize=4
        )
        if metric != "Avg.D":
            axes.axhline(reference[metric], color=colour, linestyle=(0, (4, 4)), linewidth=1)
    axes.set_ylim(bottom=0)
    height, below = axes.get_ylim()[1], float("-inf")
    # names at the lines' ends, one above the other
    for metric in sorted(lines, key=lambda m: points[-1][1][m]):
        end = points[-1][1][metric]
        below = max(end, below + 0.06 * height)
        axes.annotate(
            metric,
            (len(points) - 1, below),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=lines[metric],
            annotation_clip=False,
        )
    axes.set_xticks(list(x), [f"{value:g}" for value, _ in points])
    axes.set_xlabel(f"{name}, times the chosen one" if name == "forget_weight" else name)
    axes.set_ylabel("%  (dashed: Retrain)")
    axes.grid(color=GRID, linewidth=0.8)
    return figure
