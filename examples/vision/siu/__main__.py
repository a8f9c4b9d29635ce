"""SIU on a small image-text model; run it from the project's root:

    python -m examples.vision.siu [--seed N] [--out DIR] [--data FILE.npz]

A model learns digits, their names and facts about them, and forgets from one image what a seven
looks like. Settings were chosen on seeds 7 to 9.
"""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from examples.systems.claims import Claim, at_least, at_most, record, write
from examples.systems.images import options
from examples.systems.training import fit
from sfron_fast import methods
from sfron_fast.methods.original import adapters_alone

from . import data, words
from .figure import draw
from .judge import TASK, Judge, Marks
from .model import ImageText, make_model

OUT = Path("benchmarks/results/systems/siu")
TITLE = "SIU: a visual name forgotten from one image"
CONCEPT = 7
BATCH, EPOCHS, LR = 64, 50, 3e-3  # of the model that knows all
STEPS, RATE = 12, 3e-3  # of unlearning
ROWS = {"named": 2, "facts": 2, "others": 6}  # of each of its batches
ADAPTERS: dict[str, Any] = {"rank": 16, "alpha": 16.0, "dropout": 0.0}
NAME, NEW = [words.IDS[words.NAMES[CONCEPT]]], [words.IDS[words.NEW]]
ARMS: dict[str, dict[str, Any]] = {
    "SIU": {},
    "masks off": {"names": (), "substitutes": ()},
    "token mask alone": {"names": ()},
    "vocabulary mask alone": {"substitutes": ()},
    "cross-entropy alone": {"kl_weight": 0.0},
    "no other images": {},
}
CURVES = ("SIU", "masks off", "cross-entropy alone", "GA")


def demonstrate(seed: int, path: Path | None) -> dict[str, Any]:
    """One seed's result."""
    start = time.process_time()
    known, unseen = data.load(seed, path)
    before = make_model(seed, known.pixels.shape[-1])
    lessons = data.Lessons(known, BATCH, seed)
    fit(before, lessons, EPOCHS, LR, loss=lambda batch: TASK.mean_loss(before, batch))
    learnt = time.process_time() - start
    judge = Judge(unseen, CONCEPT, before)
    arms, curves = {"before": judge.row(before)}, {}

    def run(arm: str, unlearn: Callable[..., Any]) -> None:
        """Judge what this makes of a copy."""
        model, steps = copy.deepcopy(before), [judge.step(before)]
        seen = (lambda _, m: steps.append(judge.step(m))) if arm in CURVES else None
        unlearn(model, task=TASK, epochs=STEPS, lr=RATE, on_epoch=seen)
        arms[arm], curves[arm] = judge.row(model), steps
        print(f"{arm:>22}: " + "  ".join(f"{k} {v:.2f}" for k, v in arms[arm].items()), flush=True)

    for arm, changes in ARMS.items():
        rows = {**ROWS, "others": 0} if arm == "no other images" else ROWS
        tuning = data.Tuning(known, CONCEPT, **rows, seed=seed)
        asked: dict[str, Any] = {"data": tuning, "names": NAME, "substitutes": NEW, "seed": seed}
        settings = {**asked, **ADAPTERS, **changes}
        run(arm, lambda m, settings=settings, **rest: methods.siu(m, **settings, **rest))

    def ascent(model: ImageText, **rest: Any) -> None:
        """The same adapters, image and wordings, the name as it was."""
        with adapters_alone(model, seed=seed, **ADAPTERS):
            rows = data.renamed(known, CONCEPT, ROWS["named"], words.NAMES[CONCEPT])
            truth = data.batch(rows, known.pixels.shape[-1])
            methods.gradient_ascent(model, [truth], optimizer="adamw", weight_decay=0.01, **rest)

    run("GA", ascent)
    asked = sum(map(len, judge.asked))
    claims, controls = judged(arms, 1.0 / asked)
    facts = {
        "arms": arms,
        "curves": {arm: steps for arm, steps in curves.items() if arm in CURVES},
        "masks off, most forgotten at no less specificity": most_at(
            curves["masks off"], arms["SIU"]
        ),
        "known before": judge.known,
        "questions about the concept's name": asked,
        "weights": sum(p.numel() for p in before.parameters()),
        "images": "scikit-learn's digits" if path is None else path.name,
        "seconds of learning": round(learnt),
    }
    return record(seed, claims, controls, facts, time.process_time() - start)


def judged(arms: dict[str, Marks], least: float) -> tuple[list[Claim], list[Claim]]:
    """Claims and controls from what was measured; ``least``: one question, below which no share of
    them can be told from none.
    """
    siu, off, ga = arms["SIU"], arms["masks off"], arms["GA"]
    ratio = siu["forgotten"] / max(off["forgotten"], least)
    claims = [
        at_least("forgotten on unseen images, masks on by masks off", ratio, 5.0),
        at_least(
            "specificity, masks on minus masks off", siu["specificity"] - off["specificity"], -0.03
        ),
        at_least("facts about the name", siu["facts"], 0.9),
        at_least("parity and size of the same images", siu["parity and size"], 0.9),
        at_least("well-formed answers", siu["well-formed"], 0.95),
    ]
    controls = [
        at_most("masks off: forgotten", off["forgotten"], 0.2),
        at_most("GA: other digits named right", ga["specificity"], 0.5),
    ]
    return claims, controls


def most_at(steps: Sequence[Marks], siu: Marks) -> float:
    """The most that was forgotten after any step which had no less specificity than SIU's end."""
    enough = [step for step in steps if step["specificity"] >= siu["specificity"]]
    return max((step["forgotten"] for step in enough), default=0.0)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    chosen = options(__doc__, OUT).parse_args(arguments)
    result = demonstrate(chosen.seed, chosen.data)
    draw(write(chosen.out, result, TITLE), chosen.out / "siu.png")
    return result


if __name__ == "__main__":
    main()
