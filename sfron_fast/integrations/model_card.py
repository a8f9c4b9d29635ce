"""What a run of the command leaves beside the model: a report and a model card."""

import json
from pathlib import Path
from typing import Any

import torch

from ..files import write_whole
from ..runs.result import share_spent
from ..version import __version__
from .measures import LOOKED_AT, table

REPORT, CARD = "report.json", "README.md"

HEAD = """---
library_name: transformers
tags:
- unlearning
---
# {base}, with texts unlearned by {method}

Made by `python -m sfron_fast unlearn`, sfron_fast {version}, torch {torch}, transformers
{transformers}.

"""


def versions() -> dict[str, str]:
    """Of what made the model."""
    import transformers

    return {
        "sfron_fast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def limits(report: dict[str, Any]) -> list[str]:
    """What the figures do not show, in sentences."""
    settings = report["settings"]
    found = [
        "The figures are of the texts given, in the words given. Other wordings, other languages,"
        " and what follows from the texts were not asked for.",
        "There is no comparison with a model trained without the forget set, which alone shows"
        " that nothing of it is left.",
        "It was not tried whether the texts come back after further training or quantisation.",
        "One seed.",
    ]
    if "retain" in report["before"] and settings["budget"] is not None:
        found.append(
            "The budget was kept on retain texts that the run does not train on; other abilities"
            " of the model were not measured."
        )
    elif settings["method"] == "sfron":
        found.append(
            "There was no holdout set, so nothing bounded how far the texts were forgotten or what"
            " it cost: compare the figures before and after."
        )
    if "holdout" not in report["before"]:
        found.append("Without a holdout set it is not known how likely unseen texts are.")
    if settings["lora"]:
        found.append(
            f"Adapters of rank {settings['lora']} were trained and merged into the weights."
        )
    found += [f"The run warned: {warning}." for warning in report["warnings"]]
    if any(sizes["texts"] > LOOKED_AT for sizes in report["files"].values()):
        found.append(f"Of larger sets {LOOKED_AT} evenly spaced texts were looked at.")
    return found


def markdown(rows: list[list[str]]) -> str:
    """A table of text cells, the first row its heading."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines) + "\n"


def card(report: dict[str, Any]) -> str:
    """The model card, markdown."""
    settings, mask, made = report["settings"], report["mask"], report["versions"]
    parts = {
        "base": Path(settings["model"]).name,
        "method": settings["method"],
        "version": made["sfron_fast"],
        "torch": made["torch"],
        "transformers": made["transformers"],
    }
    used = {**settings, "model": parts["base"], "lr": report["lr"]}
    rows = [["setting", "value"], *([key, str(value)] for key, value in used.items())]
    rows += [[f"texts in {name}", str(file["texts"])] for name, file in report["files"].items()]
    rows.append(["weights trained", f"{report['trained_weights']:,} of {report['weights']:,}"])
    if mask is not None:
        rows += [["mask, sha256", mask["digest"]], ["mask, density", f"{mask['density']:.4f}"]]
    if report["budget_spent"] is not None:
        spent = share_spent(report["budget_spent"])
        rows.append(["budget spent", f"{spent} of {settings['budget']}"])
    if report["skipped_steps"] is not None:
        rows.append(["steps skipped", str(report["skipped_steps"])])
        rows.append(["of them not needed: forgotten", str(report["forgotten_steps"])])
    rows.append(["seconds", f"{report['seconds']:.0f}"])
    figures = table({"before": report["before"], "after": report["after"]})
    said = "\n".join(f"- {sentence}" for sentence in report["limits"])
    return (
        HEAD.format(**parts)
        + markdown(figures)
        + "\nLoss in nats a token; probability per token, geometric mean; extraction strength and"
        + " exact memorization\nwithout the end-of-sequence token; min k auc: forget against"
        + " holdout, .5 = cannot be told from unseen texts.\n\n## Settings\n\n"
        + markdown(rows)
        + "\n## Limits\n\n"
        + said
        + "\n"
    )


def write(report: dict[str, Any], folder: Path) -> None:
    """README.md, then report.json: with the report the run is done."""
    text = json.dumps(report, indent=1) + "\n"
    for name, content in ((CARD, card(report)), (REPORT, text)):
        write_whole(folder / name, writing(content))


def writing(content: str) -> Any:
    """For ``write_whole``: what fills a file with a text."""

    def fill(path: Path) -> None:
        path.write_text(content, encoding="utf-8")

    return fill
