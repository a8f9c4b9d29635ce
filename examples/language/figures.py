"""Pictures of the comparison: how far each arm is from Retrain, and what it paid."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from examples.systems.figures import INK, save

from .gates import Rows, excess

OURS, OTHER = "#c1440e", "#8a9199"


def colour(arm: str) -> str:
    return OURS if arm.startswith("SFR-on") else OTHER


def gaps(pairs: Sequence[Rows], mean: Rows, path: Path) -> None:
    """A bar for each arm's mean gap, a dot for each pair."""
    arms = sorted((arm for arm in mean if arm != "Retrain"), key=lambda arm: -mean[arm]["gap"])
    figure = Figure(figsize=(7.5, 0.27 * len(arms) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(arms, [mean[arm]["gap"] for arm in arms], color=[colour(arm) for arm in arms])
    for rows in pairs:
        known = [arm for arm in arms if "gap" in rows.get(arm, {})]
        axes.plot([rows[arm]["gap"] for arm in known], known, "o", color=INK, markersize=3)
    axes.set_xlabel("gap: mean of eight distances to Retrain (bar: mean, dots: pairs)")
    axes.set_ylim(-0.6, len(arms) - 0.4)
    save(figure, path)


def trade(mean: Rows, path: Path) -> None:
    """Forgetting against what is kept, and relearning against the gap; numbers name the arms."""
    arms = sorted((arm for arm in mean if arm != "Retrain"), key=lambda arm: mean[arm]["gap"])
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, arm in enumerate(arms, 1):
        row = mean[arm]
        points = ((left, row["p forget"], row["p retain"]), (right, row["gap"], excess(mean, arm)))
        for axes, x, y in points:
            label = f"{number} {arm}" if axes is left else None
            axes.plot(x, y, "o", color=colour(arm), markersize=5, label=label)
            axes.annotate(
                str(number), (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7
            )
    target = mean["Retrain"]
    left.plot(target["p forget"], target["p retain"], "*", color=INK, markersize=13)
    left.set(xlabel="p forget", ylabel="p retain", title="star: Retrain")
    right.axhline(0.0, color=INK, linewidth=0.8)
    right.plot(0.0, 0.0, "*", color=INK, markersize=13)
    right.set(xlabel="gap", ylabel="relearning excess over Retrain", title="star: Retrain")
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    save(figure, path)
