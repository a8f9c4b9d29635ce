"""What is left of the targets after each ablation, for both models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODELS = ("told derivations", "told none")
ABLATIONS = ("none", "canonical", "closure")
BARS = {
    "recall": ("direct recall", "#c1440e"),
    "leaked": ("leaked: some probe answered", "#e39a76"),
    "answered": ('right after "derive"', "#2b6777"),
    "success": ("success: verified, no leak", "#79b4a9"),
    "relearnt": ("recall after relearning the other half", "#8a9199"),
}


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Bars: means over the seeds; dots: seeds; line: what is not above chance."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True, layout="constrained")
    for axes, model in zip(panels, MODELS, strict=True):
        for place, (bar, (label, colour)) in enumerate(BARS.items()):
            at = [number + 0.16 * (place - 2) for number in range(len(ABLATIONS))]
            rows = [[r["facts"]["scores"][model][name] for r in found] for name in ABLATIONS]
            values = [[row[bar] for row in seeds] for seeds in rows]
            means = [sum(seeds) / len(seeds) for seeds in values]
            axes.bar(at, means, 0.15, color=colour, label=label if axes is panels[0] else None)
            for x, seeds in zip(at, values, strict=True):
                axes.plot([x] * len(seeds), seeds, "o", color="#222222", markersize=2.5)
        for result in found:
            chance = result["facts"]["chance"]
            limit = (chance["least above it"] - 0.5) / chance["of"]
            axes.axhline(limit, color="#222222", linestyle=":", linewidth=0.8)
        axes.set_xticks(range(len(ABLATIONS)), [f"ablated: {name}" for name in ABLATIONS])
        axes.set(title=f"model {model}", ylim=(0, 1.05))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of the targets (dotted: chance)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
