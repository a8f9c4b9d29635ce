"""`python -m benchmarks.rivals`: beside what a user would pick instead, on two tasks.

It installs nothing: packages that are not found take no part, and it says so (`pip install --group
rivals` lists them). Each runs at its defaults and in two more configurations, as ours does; nothing
is chosen afterwards, every row is shown. Means of three seeds; "from Retrain" is the mean distance
of the three accuracies from those of a model trained without the forget set.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sfron_fast as sf
from sfron_fast.demo import digits
from sfron_fast.evaluation import accuracy, predict

from .harness import provenance

OUT = Path(__file__).parent / "results" / "rivals.md"
SEEDS = (0, 1, 2)
PEOPLE, FORGOTTEN, STRANGERS = 60, 6, 20  # who is learnt, of those forgotten, and who is not
RATES = (1, 10, 100)  # times a strategy's own learning rate
Unlearn = Callable[[nn.Module, "Problem"], nn.Module]


@dataclass
class Problem:
    """A trained model, what it is to forget, and how it is judged: accuracies in percent."""

    model: nn.Module
    retrain: Callable[[], nn.Module]
    forget: Callable[[], Iterable[Any]]
    retain: Callable[[], Iterable[Any]]
    holdout: Iterable[Any]
    pairs: Callable[[], tuple[DataLoader, DataLoader]]  # (inputs, targets), as others want them
    judge: Callable[[nn.Module], tuple[float, float, float]]  # forget, retain, test
    task: sf.Task | None
    recipe: sf.Recipe


def wrong_labels(seed: int) -> Problem:
    """Scikit-learn's digits; a tenth of the training labels is wrong, and known by heart."""
    split = digits.make_split("wrong labels", seed)

    def judge(model: nn.Module) -> tuple[float, float, float]:
        parts = (split.forget, split.retain, split.test)
        found = [accuracy(predict(model, digits.ordered(part))) for part in parts]
        return found[0], found[1], found[2]

    loaders = partial(digits.shuffled, split.forget), partial(digits.shuffled, split.retain)
    return Problem(
        digits.train(split.train, seed),
        lambda: digits.train(split.retain, seed + 100),
        *loaders,
        digits.ordered(split.val),
        lambda: (loaders[0](), loaders[1]()),
        judge,
        None,
        sf.Recipe.official(),
    )


def facts_of_people(seed: int) -> Problem:
    """A small Llama that has learnt facts about people; six of them go."""
    from examples.language import facts as language

    everyone = language.people(seed, PEOPLE + STRANGERS)
    gone, kept, strangers = (
        language.together(part)
        for part in (
            everyone[:FORGOTTEN],
            everyone[FORGOTTEN:PEOPLE],
            everyone[PEOPLE:],
        )
    )

    def worded(of: language.Facts) -> language.Facts:
        asked = [of.asked(wording) for wording in range(language.WORDINGS - 1)]
        return language.together(asked)

    def trained(of: list[language.Facts], seed: int) -> nn.Module:
        model = language.make_model(seed, 3, 64, 128)
        loader = language.Loader(worded(language.together(of)), 64, seed)
        language.learn(model, loader, 30, 3e-3)
        return model

    def loader(of: language.Facts) -> Callable[[], Iterable[Any]]:
        return lambda: language.Loader(worded(of), 32, seed)

    def pairs() -> tuple[DataLoader, DataLoader]:
        """Of each token the next one, as losses that do not shift want their targets."""
        found = []
        for of in (gone, kept):
            rows = worded(of).rows()
            after = nn.functional.pad(rows["labels"][:, 1:], (0, 1), value=language.IGNORED)
            data = TensorDataset(rows["input_ids"], after)
            found.append(DataLoader(data, batch_size=32, shuffle=True))
        return found[0], found[1]

    def judge(model: nn.Module) -> tuple[float, float, float]:
        model.eval()
        asked = (gone, kept, kept.asked(language.WORDINGS - 1))
        found = [100.0 * language.accuracy(model, of) for of in asked]
        return found[0], found[1], found[2]

    return Problem(
        trained([gone, kept], seed),
        lambda: trained([kept], seed + 100),
        loader(gone),
        loader(kept),
        list(loader(strangers)()),
        pairs,
        judge,
        sf.Language(),
        sf.Recipe.language(),
    )


TASKS = {
    "wrong labels of digits (test: unseen digits)": wrong_labels,
    "facts of people (test: a wording not learnt)": facts_of_people,
}


def ours(model: nn.Module, problem: Problem, **more: Any) -> nn.Module:
    forget, retain = problem.forget(), problem.retain()
    sf.unlearn(model, forget=forget, retain=retain, task=problem.task, **more)
    return model


def our_arms() -> dict[str, Unlearn]:
    """At its defaults, with held-out data, and by the recipe of its task's authors."""

    def held_out(model: nn.Module, problem: Problem) -> nn.Module:
        return ours(model, problem, holdout=problem.holdout)

    def by_recipe(model: nn.Module, problem: Problem) -> nn.Module:
        relative = problem.recipe.wants_reference(problem.task or sf.Classification())
        more = {"holdout": problem.holdout} if relative else {}
        return ours(model, problem, recipe=problem.recipe, **more)

    name = "sfron_fast"
    return {name: ours, f"{name}, holdout": held_out, f"{name}, task's recipe": by_recipe}


STRATEGIES = ("gradient_ascent", "negative_gradient", "scrub", "saliency_unlearning", "npo")


def erasus_arms() -> dict[str, Unlearn]:
    """Strategies of erasus for classifiers and language models, and their own learning rates."""
    package = import_module("erasus")
    registry = import_module("erasus.core.registry").strategy_registry
    import_module("erasus.strategies")

    def run(model: nn.Module, problem: Problem, strategy: str, rate: int) -> nn.Module:
        lr = registry.get(strategy)().lr * rate
        unlearner = package.ErasusUnlearner(model, strategy=strategy, strategy_kwargs={"lr": lr})
        found: nn.Module = unlearner.fit(*problem.pairs()).model
        return found

    return {
        f"erasus {strategy}" + (f", {rate} x lr" if rate > 1 else ""): partial(
            run, strategy=strategy, rate=rate
        )
        for strategy in STRATEGIES
        for rate in RATES
    }


RIVALS: dict[str, Callable[[], dict[str, Unlearn]]] = {"erasus": erasus_arms}


def row(problem: Problem, arm: Unlearn, seed: int) -> tuple[nn.Module, float]:
    """The model after it, and its seconds."""
    model = copy.deepcopy(problem.model)
    torch.manual_seed(1000 + seed)
    began = time.perf_counter()
    model = arm(model, problem)
    return model, time.perf_counter() - began


def table(task: str, arms: dict[str, Unlearn], seeds: Iterable[int]) -> list[str]:
    """Markdown of one task."""
    found: dict[str, list[Tensor]] = {}
    failed: dict[str, str] = {}
    for seed in seeds:
        problem = TASKS[task](seed)
        began = time.perf_counter()
        target = torch.tensor(problem.judge(problem.retrain()))
        found.setdefault("Retrain", []).append(
            torch.cat([target, torch.tensor([0.0, time.perf_counter() - began])])
        )
        known = {"the model before": lambda model, _: model, **arms}
        for name, arm in known.items():
            try:
                model, seconds = row(problem, arm, seed)
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
                continue
            judged = torch.tensor(problem.judge(model))
            away = float((judged - target).abs().mean())
            found.setdefault(name, []).append(torch.cat([judged, torch.tensor([away, seconds])]))
            print(f"{task}, seed {seed}: {name}: {[round(x, 1) for x in found[name][-1].tolist()]}")
    lines = [f"## {task[0].upper()}{task[1:]}", ""]
    lines += ["| | forget | retain | test | from Retrain | seconds |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for name, rows in found.items():
        means = [
            statistics.fmean(column) for column in zip(*(r.tolist() for r in rows), strict=True)
        ]
        lines.append(f"| {name} | " + " | ".join(f"{m:.1f}" for m in means) + " |")
    lines += [f"| {name} | fails: {error} | | | | |" for name, error in failed.items()]
    return [*lines, ""]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("build/bench/rivals.md"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", default="", help="tasks whose name contains this")
    chosen = parser.parse_args(arguments)
    tasks = [task for task in TASKS if chosen.only in task]
    if not tasks:
        parser.error(f"--only: expected a part of {' or '.join(TASKS)}, found {chosen.only!r}")
    arms, notes = our_arms(), []
    for package, make in RIVALS.items():
        try:
            arms |= make()
            notes.append(f"{package} {metadata.version(package)}")
        except ImportError as error:
            notes.append(f"without {package} ({error}): `pip install --group rivals`")
    origin = provenance()
    told = ", ".join(f"{k} {origin[k]}" for k in ("device", "threads", "torch", "commit", "date"))
    lines = [
        "# Beside what a user would pick instead",
        "",
        str(__doc__).split("\n\n", 1)[1].strip(),
    ]
    lines += ["", f"{told}; {'; '.join(notes)}.", ""]
    for task in tasks:
        lines += table(task, arms, chosen.seeds)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text("\n".join(lines))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
