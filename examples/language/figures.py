"""Pictures of the comparison: how far each arm is from Retrain, and what it paid."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from .gates import Rows, excess

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHER, MARK = "#c1440e", "#8a9199", "#222222"


def colour(arm: str) -> str:
    return OURS if arm.startswith("SFR-on") else OTHER


def gaps(pairs: Sequence[Rows], mean: Rows, path: Path) -> None:
    """A bar for each arm's mean gap, a dot for each pair."""
    arms = sorted((arm for arm in mean if arm != "Retrain"), key=lambda arm: -mean[arm]["gap"])
    figure, axes = plt.subplots(figsize=(7.5, 0.27 * len(arms) + 1.2), layout="constrained")
    axes.barh(arms, [mean[arm]["gap"] for arm in arms], color=[colour(arm) for arm in arms])
    for rows in pairs:
        known = [arm for arm in arms if "gap" in rows.get(arm, {})]
        axes.plot([rows[arm]["gap"] for arm in known], known, "o", color=MARK, markersize=3)
    axes.set_xlabel("gap: mean of eight distances to Retrain (bar: mean, dots: pairs)")
    axes.set_ylim(-0.6, len(arms) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def trade(mean: Rows, path: Path) -> None:
    """Forgetting against what is kept, and relearning against the gap; numbers name the arms."""
    arms = sorted((arm for arm in mean if arm != "Retrain"), key=lambda arm: mean[arm]["gap"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5.6), layout="constrained")
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
    left.plot(target["p forget"], target["p retain"], "*", color=MARK, markersize=13)
    left.set(xlabel="p forget", ylabel="p retain", title="star: Retrain")
    right.axhline(0.0, color=MARK, linewidth=0.8)
    right.plot(0.0, 0.0, "*", color=MARK, markersize=13)
    right.set(xlabel="gap", ylabel="relearning excess over Retrain", title="star: Retrain")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
