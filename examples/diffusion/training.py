"""What every example trains with, and the table that it prints and leaves behind."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sfron_fast as sf
from benchmarks.harness import provenance
from examples.systems import markdown


def fit(
    model: nn.Module, task: sf.Denoising, batches: Iterable[Any], *, steps: int, lr: float
) -> nn.Module:
    """Adam, its rate falling to 0 on a cosine; passes over ``batches`` until ``steps`` are done."""
    device = next(model.parameters()).device
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    done = 0
    while done < steps:
        for batch in batches:
            adam.zero_grad()
            task.mean_loss(model, task.prepare(batch, device, "retain")).backward()
            adam.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    return model.eval()


def table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """Markdown; numbers have one decimal."""
    cells = [[f"{c:.1f}" if isinstance(c, float) else str(c) for c in line] for line in lines]
    return markdown.table(head, cells)


def write(path: Path, name: str, text: str, notes: Sequence[str]) -> None:
    """A page of one table, with what it was measured on."""
    origin = provenance()
    machine = ", ".join(f"{key} {origin[key]}" for key in ("device", "threads", "torch", "date"))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"- {note}" for note in notes)
    path.write_text(f"# {name}\n\n{text}\n\n{lines}\n- {machine}.\n", encoding="utf-8")
