"""What each setting of a run does, one at a time: `python -m benchmarks.knobs`, two minutes.

The demo's digits with a tenth of the labels wrong (docs/choosing.md), one model of seed 7, which
reports nothing else; every row is one run from it, with one setting changed. Accuracies in percent,
of the wrong labels to be forgotten, of the retain set, and of held-out digits; selected: the share
of the weights in the mask.
"""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch

import sfron_fast as sf
from sfron_fast.demo.digits import make_split, ordered, shuffled, train
from sfron_fast.demo.run import CHOSEN
from sfron_fast.evaluation import accuracy, predict

from .harness import provenance

SEED, SETTING = 7, "wrong labels"
RESULT = Path(__file__).parent / "results" / "knobs.md"
RECIPES = {
    "official": (sf.Recipe.official, CHOSEN[SETTING]["SFR-on (official)"]),
    "paper": (sf.Recipe.paper, CHOSEN[SETTING]["SFR-on (paper)"]),
    "budgeted": (sf.Recipe.budgeted, {}),
}
CHANGED: list[tuple[str, str, tuple[Any, ...]]] = [
    ("official", "max_norm", (0.1, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8)),
    ("official", "forget_weight", (0.1, 1.0, 5.0, 25.0, 125.0)),
    ("official", "cycles", (5, 10, 20, 40, 80, 160)),
    ("official", "retain_steps", (1, 2, 5, 10)),
    ("official", "forget_lr", (0.001, 0.01, 0.03)),
    ("official", "threshold", (0.5, 1.0, 2.0, 4.0)),
    ("paper", "forget_lr", (0.015, 0.05, 0.15, 0.5)),
    ("paper", "forget_weight", (0.1, 1.0, 25.0)),
    ("budgeted", "retain_budget", (0.005, 0.02, 0.05, 0.2)),
    ("budgeted", "forget_lr", (1e-5, 1e-4, 1e-3)),
    ("budgeted", "cycles", (25, 100, 400)),
]


def main() -> None:
    """Every row, printed and written."""
    torch.set_num_threads(1)
    split = make_split(SETTING, SEED)
    original = train(split.train, SEED)
    looked_at = {name: ordered(getattr(split, name)) for name in ("forget", "retain", "val")}

    def cells(model: torch.nn.Module) -> str:
        found = (accuracy(predict(model, batches)) for batches in looked_at.values())
        return " | ".join(f"{value:.1f}" for value in found)

    def row(recipe: str, name: str, value: Any) -> str:
        make, settings = RECIPES[recipe]
        changed, extra = {**settings, name: value}, {}
        if recipe == "budgeted":
            extra = {
                "holdout": looked_at["val"],
                "retain_budget": changed.pop("retain_budget", 0.05),
            }
        model = copy.deepcopy(original)
        torch.manual_seed(2000 + SEED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # spending too much is in the table
            result = sf.unlearn(
                model,
                forget=shuffled(split.forget),
                retain=shuffled(split.retain),
                recipe=make(**changed),
                **extra,
            )
        spent = "" if result.budget_spent is None else f"{result.budget_spent:.2f}"
        selected, weights = (
            sum(result.mask.counts().values()),
            sum(map(result.mask.size, result.mask)),
        )
        share = f"{100 * selected / weights:.1f}"
        return f"| {recipe} | {name} {value:g} | {cells(model)} | {share} | {spent} |"

    lines = ["| recipe | setting | forget | retain | held out | selected | budget spent |"]
    lines += ["| --- | --- " + "| ---: " * 5 + "|", f"| | before | {cells(original)} | | |"]
    for recipe, name, values in CHANGED:
        lines += [row(recipe, name, value) for value in values]
        print(*lines[-len(values) :], sep="\n", flush=True)
    text = [line.strip() for line in __doc__.split("\n\n")[1:]]
    defaults = [f"- {name}: {settings}" for name, (_, settings) in RECIPES.items()]
    machine = ", ".join(str(provenance()[key]) for key in ("device", "torch", "commit", "date"))
    page = ["# One setting at a time", "", *text, "", *lines, "", "Settings where not changed:", ""]
    RESULT.write_text("\n".join([*page, *defaults, "", f"{machine}.", ""]))


if __name__ == "__main__":
    main()
