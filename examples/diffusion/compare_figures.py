"""Pictures of the comparison: what each method paid, and what it makes."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch

from sfron_fast.evaluation.diffusion import grid

from .compare import EACH
from .compare_arms import METHODS
from .compare_gates import Found, having, mean, values
from .digits import CLASSES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SHOWN = (3, 0)  # class and base model of the picture


def trade(pairs: Sequence[Found], path: Path) -> None:
    """FA against RA and against FD: small dots are pairs, the large one their mean. Gradient ascent
    would be the scale.
    """
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    colours = plt.get_cmap("tab10").colors
    arms = [arm for arm in ("Retrain", *METHODS) if having(pairs, arm)]
    arms = [arm for arm in arms if arm != "gradient ascent"]
    for number, arm in enumerate(arms):
        there = having(pairs, arm)
        colour = "black" if arm == "Retrain" else colours[number % len(colours)]
        for ax, key, w in ((axes[0], "ra", "0"), (axes[1], "fd", "1")):
            x, y = values(there, arm, "fa", w), values(there, arm, key, w)
            marker = "*" if arm == "Retrain" else "o"
            ax.plot(x, y, marker, color=colour, markersize=3, alpha=0.35)
            ax.plot(mean(x), mean(y), marker, color=colour, markersize=10, label=arm)
    axes[0].set(xlabel="FA (guidance 0), percent", ylabel="RA (guidance 0), percent")
    axes[1].set(xlabel="FA (guidance 1), percent", ylabel="FD (guidance 1)", ylim=(0.0, None))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pictured(strips: Path, path: Path) -> bool:
    """Images of all classes, a row for each model; False where there are none."""
    label, seed = SHOWN
    names = ("base", "Retrain", *METHODS, "noise")
    there = {name: strips / f"{seed}_{label}_{name}.pt" for name in names}
    there = {name: file for name, file in there.items() if file.exists()}
    if not there:
        return False
    figure, axes = plt.subplots(
        len(there), 1, figsize=(9, 0.48 * len(there) + 0.5), layout="constrained", squeeze=False
    )
    for ax, (name, file) in zip(axes[:, 0], there.items(), strict=True):
        whole = grid(torch.load(file, weights_only=True), CLASSES * EACH).numpy()
        ax.imshow(whole, interpolation="nearest")
        ax.set_yticks([])
        ax.set_xticks([])
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    axes[0, 0].set_title(f"classes 0 to 9, two images each; {label} is forgotten", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
