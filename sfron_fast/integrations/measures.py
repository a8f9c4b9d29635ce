"""What the command says of a model: how well it knows each set of texts."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.utils.data import DataLoader

from ..evaluation.language import (
    answer_loss,
    answer_probability,
    auc,
    exact_memorization,
    extraction_strength,
    min_k,
    token_stats,
)
from .texts import Texts

LOOKED_AT = 512  # texts of a set
FIGURES = {
    "loss": answer_loss,
    "probability": answer_probability,
    "extraction_strength": extraction_strength,
    "exact_memorization": exact_memorization,
}
AUC = "min_k_auc"  # forget against holdout: .5 = as texts never seen, 1 = known by heart


def measure(
    model: nn.Module, sets: Mapping[str, Texts], *, batch_size: int = 16
) -> dict[str, dict[str, float]]:
    """Of each set its texts (``texts``) and means over them (``FIGURES``), in eval mode; of the
    forget set ``min_k_auc`` beside the holdout set, if there is one.

    Of a set with more than 512 texts, 512 evenly spaced ones are looked at.
    """
    found: dict[str, dict[str, float]] = {}
    known = {}
    for name, texts in sets.items():
        some: Any = texts.some(LOOKED_AT)
        loader = DataLoader(some, batch_size=batch_size, collate_fn=texts.collate)
        stats = token_stats(model, loader, name=name)
        found[name] = {"texts": len(some)}
        found[name] |= {key: float(of(stats).mean()) for key, of in FIGURES.items()}
        known[name] = min_k(stats)
    if {"forget", "holdout"} <= known.keys():
        found["forget"][AUC] = auc(known["forget"], known["holdout"])
    return found


def table(columns: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[list[str]]:
    """Rows of text, the first the heading: set, figure, and a column for each measurement."""
    rows = [["set", "figure", *columns]]
    first = next(iter(columns.values()))
    for name, figures in first.items():
        for key in figures:
            if key != "texts":
                values = [f"{found[name][key]:.3f}" for found in columns.values()]
                rows.append([name, key.replace("_", " "), *values])
    return rows
