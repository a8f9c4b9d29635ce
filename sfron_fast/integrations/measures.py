"""What the command says of a model: how well it knows each set of texts."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
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
from .processes import ALONE, Processes
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
    model: nn.Module,
    sets: Mapping[str, Texts],
    *,
    batch_size: int = 16,
    processes: Processes = ALONE,
) -> dict[str, dict[str, float]]:
    """Of each set its texts (``texts``) and means over them (``FIGURES``), in eval mode; of the
    forget set ``min_k_auc`` beside the holdout set, if there is one.

    Of a set with more than 512 texts, 512 evenly spaced ones are looked at, by several processes
    together.
    """
    found: dict[str, dict[str, float]] = {}
    known = {}
    for name, texts in sets.items():
        values = _of_each(model, texts, name, batch_size, processes)
        known[name] = values.pop(AUC)
        found[name] = {"texts": len(known[name])}
        found[name] |= {key: float(value.mean()) for key, value in values.items()}
    if {"forget", "holdout"} <= known.keys():
        found["forget"][AUC] = auc(known["forget"], known["holdout"])
    return found


def _of_each(
    model: nn.Module, texts: Texts, name: str, batch_size: int, processes: Processes
) -> dict[str, Tensor]:
    """``FIGURES`` of every text that is looked at [texts], and what the AUC compares."""
    some = texts.some(LOOKED_AT)
    mine = some[processes.rank :: processes.size]
    # shards wait for every process in every batch: one with fewer texts looks at some twice
    missing = -(-len(some) // processes.size) - len(mine)
    rows: Any = mine + (mine or some)[-1:] * missing
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=texts.collate)
    stats = token_stats(model, loader, name=name)
    values = {key: of(stats) for key, of in FIGURES.items()} | {AUC: min_k(stats)}
    parts = processes.all({key: value[: len(mine)] for key, value in values.items()})
    return {key: torch.cat([part[key] for part in parts]) for key in values}


def aligned(rows: list[list[str]]) -> str:
    """Rows of text as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


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
