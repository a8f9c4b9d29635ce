"""`python -m sfron_fast demo`: unlearning on scikit-learn's bundled digits, against a retrained
reference.

Two settings: forget one class, and forget the 10 % of the training samples whose labels were wrong
and got memorised. The settings below were chosen by ``benchmarks/demo_settings.py`` on validation
data and other seeds; it never looks at the test set or at the retrained model.
"""

import copy
import multiprocessing
import os
import queue
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import progress_bar
from ..evaluation import Evaluated, accuracy, collect, per_sample_loss, predict, score
from ..evaluation.report import Report
from ..methods import finetune, gradient_ascent
from ..runs.recipe import Recipe
from ..runs.stopwatch import Stopwatch
from ..runs.unlearn import unlearn
from ..saliency.mask import SaliencyMask
from .digits import FORGOTTEN_CLASS, SETTINGS, Split, make_split, ordered, shuffled, train

SEEDS = (0, 1, 2)
METHODS = ("Original", "Retrain", "FT", "GA", "SFR-on (paper)", "SFR-on (official)")

# Chosen by benchmarks/demo_settings.py, see above. Both recipes needed one thing their defaults
# lack: a tight clip. A class known by heart has next to no forget gradient until forgetting sets
# in, and then it runs away.
_PAPER = {"cycles": 40, "lr": 0.05, "slow_lr": 0.5, "forget_weight": 25.0, "max_norm": 1.0}
_OFFICIAL = {"cycles": 40, "forget_weight": 25.0}
CHOSEN: dict[str, dict[str, dict[str, Any]]] = {
    "one class": {
        "FT": {"lr": 0.1},
        "GA": {"lr": 0.04},
        "SFR-on (paper)": {**_PAPER, "forget_lr": 0.045},
        "SFR-on (official)": {**_OFFICIAL, "max_norm": 0.4},
    },
    "wrong labels": {
        "FT": {"lr": 0.1},
        "GA": {"lr": 0.04},
        "SFR-on (paper)": {**_PAPER, "forget_lr": 0.15},
        "SFR-on (official)": {**_OFFICIAL, "max_norm": 1.6},
    },
}


@dataclass
class Unlearned:
    """A method's model and what it took."""

    model: nn.Module
    seconds: float
    mask: SaliencyMask | None = None


def apply_method(
    method: str,
    settings: dict[str, Any],
    original: nn.Module,
    split: Split,
    seed: int,
    look: Callable[[nn.Module], None] = lambda model: None,
) -> Unlearned:
    """Run FT, GA or an SFR-on recipe on a copy of ``original``, with about ten looks on the way,
    off the clock.
    """
    model = copy.deepcopy(original)
    torch.manual_seed(2000 + seed)
    retain, forget = shuffled(split.retain), shuffled(split.forget)
    if method in ("FT", "GA"):
        with Stopwatch() as watch:

            def on_epoch(epoch: int, model: nn.Module) -> None:
                with watch.pause():
                    look(model)

            if method == "FT":
                finetune(model, retain, **settings, on_epoch=on_epoch)
            else:
                gradient_ascent(model, forget, **settings, on_epoch=on_epoch)
        return Unlearned(model, watch.seconds)

    def on_cycle(cycle: int, model: nn.Module) -> None:
        if cycle % 4 == 0:
            look(model)

    recipe = (Recipe.paper if method == "SFR-on (paper)" else Recipe.official)(**settings)
    result = unlearn(model, forget=forget, retain=retain, recipe=recipe, on_cycle=on_cycle)
    return Unlearned(model, result.seconds, result.mask)


def run_one(setting: str, seed: int, done: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Every method in one setting with one seed: metrics, and for the figures curves, losses, mask
    densities.
    """
    split = make_split(setting, seed)
    loaders = {
        "forget": ordered(split.forget),
        "retain": ordered(split.retain),
        "holdout": ordered(split.test),
    }
    out: dict[str, Any] = {"metrics": {}, "curves": {}, "losses": {}, "density": {}}

    with Stopwatch() as original_time:
        original = train(split.train, seed)
    done()
    with Stopwatch() as retrain_time:
        retrained = train(split.retain, 3000 + seed)
    reference = collect(retrained, **loaders)

    def record(method: str, model: nn.Module, seconds: float) -> None:
        evaluated = reference if model is retrained else collect(model, **loaders)
        out["metrics"][method] = score(evaluated, reference=reference, rte=seconds)
        out["losses"][method] = _losses(evaluated)
        done()

    record("Retrain", retrained, retrain_time.seconds)
    record("Original", original, original_time.seconds)
    for method in METHODS[2:]:
        curve = [_point(original, split)]

        def look(model: nn.Module, curve: list[tuple[float, float]] = curve) -> None:
            curve.append(_point(model, split))

        unlearned = apply_method(method, CHOSEN[setting][method], original, split, seed, look)
        out["curves"][method] = curve
        if unlearned.mask is not None:
            total = sum(unlearned.mask.counts().values()) / sum(
                map(unlearned.mask.size, unlearned.mask)
            )
            out["density"][method] = (unlearned.mask.density(), total)
        record(method, unlearned.model, unlearned.seconds)
    return out


def _losses(evaluated: Evaluated) -> dict[str, list[float]]:
    return {
        "forget": per_sample_loss(evaluated.forget).tolist(),
        "test": per_sample_loss(evaluated.holdout).tolist(),
    }


def _point(model: nn.Module, split: Split) -> tuple[float, float]:
    forget, retain = (accuracy(predict(model, ordered(d))) for d in (split.forget, split.retain))
    return forget, retain


# --- running everything, two processes at a time --------------------------------------------------

_ticks: Any = None


def _start_worker(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)


def _work(job: tuple[str, int]) -> dict[str, Any]:
    return run_one(*job, done=lambda: _ticks.put(1))


def run_all(
    jobs: list[tuple[str, int]], workers: int, progress: bool = True
) -> dict[tuple[str, int], dict[str, Any]]:
    """``run_one`` for every (setting, seed), each in a process of its own with one thread."""
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with ProcessPoolExecutor(workers, context, _start_worker, (ticks,)) as pool:
        futures = {job: pool.submit(_work, job) for job in jobs}
        for _ in progress_bar(
            _until_done(futures, ticks), range(len(jobs) * (len(METHODS) + 1)), "Demo", progress
        ):
            pass
        return {job: future.result() for job, future in futures.items()}


def _until_done(futures: dict[Any, Future[Any]], ticks: Any) -> Iterator[int]:
    """One item per finished method; ends when every job has, well or badly."""
    while not all(future.done() for future in futures.values()) or not ticks.empty():
        try:
            yield ticks.get(timeout=0.2)
        except queue.Empty:
            continue


def main(out: Path, seeds: tuple[int, ...] = SEEDS) -> Path:
    """Run the demo, print the table, write the report; returns its folder."""
    jobs = [(setting, seed) for seed in seeds for setting in SETTINGS]
    runs = run_all(jobs, workers=min(len(os.sched_getaffinity(0)), len(jobs)))
    report = Report(DESCRIPTIONS, notes=NOTES)
    for (setting, seed), run in runs.items():
        for method in METHODS:
            report.add(setting, method, seed, run["metrics"][method])
    print(report.table())
    return report.save(out, _figures(runs, seeds[0]))


DESCRIPTIONS = {
    "one class": (
        f"scikit-learn digits, small ConvNet; forget every {FORGOTTEN_CLASS}; tested on the other"
        " classes"
    ),
    "wrong labels": (
        "scikit-learn digits, small ConvNet; forget the 10 % of the training samples with wrong"
        " labels"
    ),
}
NOTES = [
    (
        "Settings of every method were chosen on validation data with other seeds"
        " (benchmarks/demo_settings.py), never on the test set or the retrained model."
    ),
    "RTE was measured with one thread, as many runs at a time as there are cores.",
    "Times are drawn of the methods that end within 10 points of Retrain on forget and retain set.",
]


NEAR = 10.0  # points of accuracy from Retrain's


def _did_it(method: str, results: list[dict[str, Any]]) -> bool:
    """Whether a method ends near Retrain on both sets: only then do their times compare."""
    apart = [
        statistics.mean(r[method][name] for r in results)
        - statistics.mean(r["Retrain"][name] for r in results)
        for name in ("FA", "RA")
    ]
    return all(abs(a) <= NEAR for a in apart)


def _figures(runs: dict[tuple[str, int], dict[str, Any]], seed: int) -> dict[str, Any]:
    """Trade-off, loss histograms, mask density (one seed) and times (all seeds, of the methods that
    end near Retrain), per setting.
    """
    from ..evaluation import figures

    made = {}
    for setting in SETTINGS:
        run, name = runs[setting, seed], setting.replace(" ", "_")
        reference = run["metrics"]["Retrain"]
        made[f"tradeoff_{name}"] = figures.tradeoff(
            run["curves"], (reference["FA"], reference["RA"])
        )
        shown = ("Original", "SFR-on (paper)", "SFR-on (official)", "Retrain")
        made[f"losses_{name}"] = figures.loss_histograms({m: run["losses"][m] for m in shown})
        densities, total = run["density"]["SFR-on (paper)"]
        if min(densities.values()) < 1.0:  # a mask of everything is no picture
            made[f"mask_{name}"] = figures.mask_density(densities, total)
        results = [r["metrics"] for (s, _), r in runs.items() if s == setting]
        times = {m: [r[m]["RTE"] for r in results] for m in METHODS[1:] if _did_it(m, results)}
        made[f"time_{name}"] = figures.time_per_method(
            {
                m: (statistics.mean(t), statistics.stdev(t) if len(t) > 1 else 0.0)
                for m, t in times.items()
            }
        )
    return made
