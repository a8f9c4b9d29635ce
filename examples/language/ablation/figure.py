"""What is left of the targets after each ablation, for both models."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.systems.figures import INK, bars, save

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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, model in zip(panels, MODELS, strict=True):
        for place, (bar, (label, colour)) in enumerate(BARS.items()):
            rows = [[r["facts"]["scores"][model][name] for r in found] for name in ABLATIONS]
            values = [[row[bar] for row in seeds] for seeds in rows]
            told = label if axes is panels[0] else None
            bars(axes, values, 0.15, 0.16 * (place - 2), colour=colour, label=told, dot=2.5)
        for result in found:
            chance = result["facts"]["chance"]
            limit = (chance["least above it"] - 0.5) / chance["of"]
            axes.axhline(limit, color=INK, linestyle=":", linewidth=0.8)
        axes.set_xticks(range(len(ABLATIONS)), [f"ablated: {name}" for name in ABLATIONS])
        axes.set(title=f"model {model}", ylim=(0, 1.05))
    panels[0].set_ylabel("share of the targets (dotted: chance)")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    save(figure, path)
