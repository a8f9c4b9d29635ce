"""Figures of an unlearning run: functions from data to a matplotlib Figure, without pyplot's global
state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..errors import require
from .labels import place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
# Okabe and Ito's colours, told apart with any colour vision. Known methods look the same in every
# figure.
OTHERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195")
NAMED = {
    "Original": "#8a8a8a",
    "Retrain": "#222222",
    "SFR-on": "#D55E00",
    "SFR-on (paper)": "#D55E00",
    "SFR-on (official)": "#8C3A00",
    "SFR-on (separate)": "#F0A068",
    "SA": "#8B8000",
} | dict(zip(("FT", "GA", "RL", "SalUn", "BT", "SCRUB"), OTHERS, strict=True))
FORGET, TEST = "#D55E00", "#0072B2"
LOSS_FLOOR = 1e-8  # smaller losses are drawn here: a logarithmic axis has no zero


def tradeoff(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    reference: tuple[float, float] | None = None,
) -> Figure:
    """Path of each method through (forget accuracy, retain accuracy), in percent, its end marked.

    `reference`: the retrained model, a star. A first point that all paths of two and more points
    share is the original model. Raises ValueError for a method without points.
    """
    figure, axes = _figure(7.2, 4.6)
    colours = _colours(curves)
    starts = {tuple(points[0]) for points in curves.values() if len(points) > 1}
    marks: list[tuple[float, float]] = []
    labels: list[tuple[str, float, float, str]] = []
    for method, points in curves.items():
        require(
            len(points) > 0, f"curves[{method!r}]", "at least one (forget, retain) point", "none"
        )
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colours[method], linewidth=1.8, marker="o", markersize=3, alpha=0.75)
        axes.plot(
            x[-1],
            y[-1],
            "o",
            color=colours[method],
            markersize=9,
            markeredgecolor="white",
            zorder=6,
        )
        labels.append((method, x[-1], y[-1], colours[method]))
        # Points along the segments too, so that no label is put across a line.
        for (x0, y0), (x1, y1) in pairwise(points):
            marks += [(x0 + k / 8 * (x1 - x0), y0 + k / 8 * (y1 - y0)) for k in range(8)]
        marks.append(points[-1])
    if len(starts) == 1:
        x0, y0 = starts.pop()
        axes.plot(
            x0,
            y0,
            "o",
            color="white",
            markeredgecolor=SOFT,
            markeredgewidth=1.8,
            markersize=9,
            zorder=5,
        )
        labels.append(("Original", x0, y0, SOFT))
    if reference is not None:
        axes.plot(*reference, "*", color=INK, markersize=20, markeredgecolor="white", zorder=4)
        labels.insert(0, ("Retrain", *reference, INK))
        marks.append(reference)
    axes.set_xlabel("accuracy on the forget set (%)")
    axes.set_ylabel("accuracy on the retain set (%)")
    axes.grid(color=GRID, linewidth=0.8)
    axes.margins(0.1, 0.12)
    if reference is not None:
        axes.set_title("Unlearning paths: the closer the end to the star, the better", loc="left")
    if _crowded([(x, y) for _, x, y, _ in labels]):
        from matplotlib.lines import Line2D

        shown = [
            Line2D(
                [],
                [],
                marker="*" if name == "Retrain" else "o",
                linestyle="none",
                color=colour,
                label=name,
            )
            for name, _, _, colour in labels
        ]
        axes.legend(handles=shown, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    else:
        place_labels(figure, axes, labels, marks)
    return figure


def _crowded(points: Sequence[tuple[float, float]]) -> bool:
    """Whether seven of them share a place of a tenth of the extent: then not every label fits
    beside its point.
    """
    spans = [max(v) - min(v) or 1.0 for v in zip(*points, strict=True)]
    return any(
        sum(
            all(abs(a - b) <= span / 20 for a, b, span in zip(p, q, spans, strict=True))
            for q in points
        )
        >= 7
        for p in points
    )


def loss_histograms(models: Mapping[str, Mapping[str, Any]]) -> Figure:
    """One panel per model: the losses of forget and test samples, log axis, as shares of each set
    in percent.

    `models`: {title: {"forget": losses, "test": losses}}, arrays or tensors in nats >= 0. After
    good unlearning the two sets differ as they do in the retrained model. Raises ValueError for no
    model, or for losses that are missing, negative or not finite.
    """
    require(bool(models), "models", "at least one model", "none")
    import numpy as np

    losses = {}
    for title, sets in models.items():
        for name in ("forget", "test"):
            where = f"models[{title!r}][{name!r}]"
            require(name in sets, where, "losses", "none", 'give "forget" and "test"')
            values = np.asarray(sets[name], dtype=np.float64).ravel()
            good = values.size > 0 and bool(np.isfinite(values).all()) and bool((values >= 0).all())
            require(good, where, "finite losses >= 0", f"{values.size} values, not all such")
            losses[title, name] = np.maximum(values, LOSS_FLOOR)
    every = np.concatenate(list(losses.values()))
    low, high = np.floor(np.log10(every.min())), np.ceil(np.log10(every.max()))
    bins = np.logspace(low, max(high, low + 1), 41)
    figure, first = _figure(max(3.6, 2.6 * len(models) + 0.6), 2.9, columns=len(models))
    for axes, title in zip(figure.axes, models, strict=True):
        for name, colour in (("forget", FORGET), ("test", TEST)):
            values = losses[title, name]
            share = np.full(values.size, 100.0 / values.size)
            style: dict[str, Any] = {"bins": bins, "weights": share, "color": colour}
            axes.hist(values, histtype="stepfilled", alpha=0.25, **style)
            axes.hist(values, histtype="step", linewidth=1.5, **style)
            # The offset keeps both dashed lines visible where the medians agree.
            dashes = (0 if name == "forget" else 4, (4, 4))
            axes.axvline(float(np.median(values)), color=colour, linewidth=1.5, linestyle=dashes)
        axes.set_xscale("log")
        axes.set_title(title, loc="left")
    first.set_ylabel("share of the set (%)")
    for height, (name, colour) in zip(
        (0.98, 0.89), (("forget", FORGET), ("test", TEST)), strict=True
    ):
        first.text(
            0.97,
            height,
            name,
            color=colour,
            weight="bold",
            ha="right",
            va="top",
            transform=first.transAxes,
        )
    first.set_ylim(0, 1.15 * first.get_ylim()[1])
    figure.supxlabel("loss per sample (nats); dashed: median", fontsize=10)
    return figure


def mask_density(densities: Mapping[str, float], total: float | None = None) -> Figure:
    """Share of salient weights per layer as bars, in percent of the layer.

    `densities`: {layer: share in [0, 1]}, in order from the top. `total`: the share over all
    weights, a line; without it the line is the plain mean over layers, and says so. Raises
    ValueError for other shares.
    """
    require(bool(densities), "densities", "at least one layer", "none")
    shares = {**{f"densities[{name!r}]": d for name, d in densities.items()}, "total": total or 0.0}
    for name, share in shares.items():
        require(0.0 <= share <= 1.0, name, "a share in [0, 1]", share)
    count = len(densities)
    figure, axes = _figure(7.2, min(1.1 + 0.24 * count, 16.0))
    values = [100.0 * d for d in densities.values()]
    blank = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    size = 8.5 if count <= 40 else 6.0
    bars = axes.barh(range(count), values, height=0.72, color=OTHERS[0])
    axes.bar_label(
        bars,
        [f"{v:.1f}" for v in values],
        padding=3,
        fontsize=size,
        color=SOFT,
        zorder=3,
        bbox=blank,
    )
    axes.set_yticks(range(count), list(densities), fontsize=size)
    axes.set_ylim(count - 0.4, -0.6)
    line = sum(values) / count if total is None else 100.0 * total
    label = f"{'mean of the layers' if total is None else 'all weights'}: {line:.1f} %"
    axes.axvline(line, color=FORGET, linewidth=1.5)
    axes.set_xlim(0, 1.12 * max(*values, line, 1.0))
    right = line > 0.5 * axes.get_xlim()[1]
    axes.annotate(
        label,
        (line, 1),
        (-4 if right else 4, 3),
        xycoords=("data", "axes fraction"),
        color=FORGET,
        textcoords="offset points",
        ha="right" if right else "left",
        weight="bold",
    )
    axes.set_xlabel("salient weights (% of the layer)")
    axes.tick_params(axis="y", length=0)
    return figure


def time_per_method(times: Mapping[str, tuple[float, float]]) -> Figure:
    """Wall time of each method, {method: (mean, standard deviation)} in seconds, as bars from the
    top.

    With "Retrain" among them, the labels compare with it. Raises ValueError for no method, or a
    mean that is not positive.
    """
    require(bool(times), "times", "at least one method", "none")
    for method, (mean, std) in times.items():
        require(mean > 0 and std >= 0, f"times[{method!r}]", "mean > 0 and std >= 0", (mean, std))

    def text(method: str) -> str:
        said = f"{_short(times[method][0])} s"
        if "Retrain" not in times or method in ("Retrain", "Original"):
            return said
        ratio = _short(times["Retrain"][0] / times[method][0])
        return f"{said}   {ratio}× as fast as Retrain"  # noqa: RUF001

    figure, axes = _bars(times, text, 0.42)
    axes.set_xlim(0, 1.2 * max(m + s for m, s in times.values()))
    axes.set_xlabel("wall time (s)")
    return figure


def _bars(
    rows: Mapping[str, tuple[float, float]], text: Callable[[str], str], each: float
) -> tuple[Figure, Axes]:
    """Bars of {method: (mean, standard deviation)} from the top, ``each`` inches apart."""
    (figure, axes), colours = _figure(7.2, 0.9 + each * len(rows)), _colours(rows)
    axes.barh(
        range(len(rows)),
        [mean for mean, _ in rows.values()],
        height=0.66,
        color=[colours[method] for method in rows],
        xerr=[std for _, std in rows.values()],
        error_kw={"ecolor": SOFT, "elinewidth": 1.2, "capsize": 3},
    )
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "color": INK}
    for row, (method, (mean, std)) in enumerate(rows.items()):
        axes.annotate(text(method), (mean + std, row), (6, 0), **style)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Axes]:
    """A figure in inches and its first axes."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install sfron-fast[eval]") from error
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    grid = figure.subplots(1, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(SOFT)
        axes.tick_params(colors=SOFT, labelcolor=INK)
        axes.set_axisbelow(True)
    return figure, grid[0][0]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.1f}"


def _colours(methods: Iterable[str]) -> dict[str, str]:
    rest = [method for method in methods if method not in NAMED]
    return NAMED | {method: OTHERS[i % len(OTHERS)] for i, method in enumerate(rest)}
