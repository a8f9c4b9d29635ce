"""Unlearning as ablation, on sums modulo 97; run it from the project's root:

python -m examples.language.ablation [--seed N] [--methods NAME ...] [--out DIR]

Two models learn the same sums in the same forms; one is also told how to derive others, step by
step. 16 sums are taken away, and asked for again. Settings were chosen on seed 7.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import LlamaForCausalLM

from examples.systems.claims import at_least, at_most, parser, record, write
from sfron_fast import methods

from .arithmetic import Statement, World, added, world
from .figure import draw
from .harness import ALPHA, RELEARN, Score, above_chance, score
from .learner import TASK, Batches, known, learn, make_model

OUT = Path("benchmarks/results/systems/ablation")
EPOCHS, LR, BATCH = 20, 3e-3, 128
ABLATION: dict[str, Any] = {"lr": 1e-3, "retain_weight": 1.0, "max_norm": 1.0}
STATEMENTS = 32  # to forget in a step
ABLATION_STEPS = 60
FLAGGED = 0.9  # of the targets


def ids(batch: Any) -> Tensor:
    """The statements' numbers."""
    return batch["id"]


METHODS = {
    "npo": partial(methods.npo, ids=ids),
    "simnpo": methods.simnpo,
    "grad_diff": methods.grad_diff,
    "wga": methods.wga,
}


def ablated(
    model: LlamaForCausalLM,
    gone: Sequence[Statement],
    kept: Sequence[Statement],
    method: str,
    seed: int,
) -> LlamaForCausalLM:
    """A copy without these statements; as many steps whatever their number."""
    forget = Batches(gone, STATEMENTS, seed)
    epochs = -(-ABLATION_STEPS // len(forget))
    run: Any = METHODS[method]
    return run(
        copy.deepcopy(model),
        forget=forget,
        retain=Batches(kept, BATCH, seed),
        task=TASK,
        epochs=epochs,
        **ABLATION,
    )


def learnt(told: World, with_steps: bool, seed: int) -> LlamaForCausalLM:
    """A model before any ablation."""
    batches = Batches(told.told + told.derivations(with_steps), BATCH, seed)
    return learn(make_model(seed), batches, EPOCHS, LR)


def scores(
    model: LlamaForCausalLM, told: World, with_steps: bool, method: str, seed: int
) -> dict[str, Score]:
    """Before and after two ablations."""
    kept = told.kept + told.derivations(with_steps)
    after = {"none": model}
    for name, gone in (("canonical", told.canonical), ("closure", told.closure)):
        after[name] = ablated(model, gone, kept, method, seed)
    return {name: score(judged, told, seed, with_steps) for name, judged in after.items()}


def demonstrate(
    told: World, models: Sequence[LlamaForCausalLM], method: str, seed: int, learning: float
) -> dict[str, Any]:
    """One seed's result with one method, of the two models; they took ``learning`` seconds."""
    start = time.process_time()
    derives, recalls = (
        scores(model, told, with_steps, method, seed)
        for model, with_steps in zip(models, (True, False), strict=True)
    )
    guessed, guessed_too = (known(m, [added(*pair) for pair in told.never]) for m in models)
    count = len(told.targets)
    rate = max(guessed, guessed_too, 1.0 / 97)
    wanted = above_chance(rate, count)
    above, chance = wanted / count, (wanted - 1) / count
    claims = [
        at_most("canonical statement ablated: direct recall", derives["canonical"].recall, chance),
        at_least("and flagged as a leak, targets", derives["canonical"].leaked, FLAGGED),
        at_most("closure ablated: direct recall", derives["closure"].recall, chance),
        at_least("and derived again without a leak", derives["closure"].success, above),
    ]
    controls = [
        at_most("told no derivation, closure ablated: right", recalls["closure"].success, chance),
        at_most("nothing ablated: counted as success", derives["none"].success, 0.0),
        at_least("told no derivation, nothing ablated: recall", recalls["none"].recall, 0.9),
    ]
    models = {"told derivations": derives, "told none": recalls}
    facts = {
        "method": method,
        "targets": [list(pair) for pair in told.targets],
        "statements": {"closure": len(told.closure), "told": len(told.told)},
        "recall of sums never told": {"told derivations": guessed, "told none": guessed_too},
        "chance": {"rate": rate, "alpha": ALPHA, "least above it": wanted, "of": count},
        "scores": {
            model: {name: asdict(row) for name, row in rows.items()}
            for model, rows in models.items()
        },
        "settings": {"ablation": ABLATION, "steps": ABLATION_STEPS, "relearning": RELEARN},
    }
    return record(seed, claims, controls, facts, learning + time.process_time() - start)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    known = parser(__doc__, OUT)
    known.add_argument("--methods", choices=METHODS, nargs="+", default=["npo", "simnpo"])
    options = known.parse_args(arguments)
    start, told = time.process_time(), world(options.seed)
    models = [learnt(told, with_steps, options.seed) for with_steps in (True, False)]
    learning, results = time.process_time() - start, {}
    for method in options.methods:
        print(f"ablated by {method}")
        result = demonstrate(told, models, method, options.seed, learning)
        for model, rows in result["facts"]["scores"].items():
            for name, row in rows.items():
                numbers = {key: value for key, value in row.items() if key != "probes"}
                said = "  ".join(f"{key} {value:.2f}" for key, value in numbers.items())
                print(f"{model}, {name} ablated: {said}", flush=True)
        title = f"Unlearning as ablation: sums taken away by {method}, and derived again"
        folder = options.out / method
        draw(write(folder, result, title), folder / "ablation.png")
        results[method] = result
    return results


if __name__ == "__main__":
    main()
