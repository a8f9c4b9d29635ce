"""`python -m sfron_fast demo`: unlearning on scikit-learn's bundled digits, against a retrained reference.

Two settings: forget one class, and forget the 10 % of the training samples whose labels were wrong and got
memorised. The settings below were chosen by ``benchmarks/demo_settings.py`` on validation data and other seeds;
it never looks at the test set or at the retrained model.
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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from .batches import progress_bar
from .evaluation import Evaluated, Stopwatch, accuracy, collect, per_sample_loss, predict, score
from .recipes import Recipe, finetune, gradient_ascent
from .report import Report
from .saliency import SaliencyMask
from .unlearning import unlearn

FORGOTTEN_CLASS = 3
WRONG_SHARE = 0.1
SEEDS = (0, 1, 2)
BATCH = 64
METHODS = ("Original", "Retrain", "FT", "GA", "SFR-on (paper)", "SFR-on (official)")
SETTINGS = ("one class", "wrong labels")


@dataclass(frozen=True)
class Split:
    """One setting's data: what was trained on, split into forget and retain; validation; test."""

    forget: TensorDataset
    retain: TensorDataset
    train: TensorDataset
    val: TensorDataset
    test: TensorDataset


def small_convnet() -> nn.Module:
    """Three 3x3 convolutions with BatchNorm for 8x8 digits, about 58,000 weights."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32), nn.MaxPool2d(2), *block(32, 64), *block(64, 64), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10)
    )


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [0, 1] and labels [1797] of the digits in scikit-learn's wheel."""
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn's digits: pip install sfron-fast[eval]") from error
    digits = bundled()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return images, torch.tensor(digits.target, dtype=torch.int64)


def make_split(setting: str, seed: int) -> Split:
    """Train 1,200, validation 250, test 347 digits, drawn by ``seed``, and the setting's forget set."""
    images, labels = load_digits()
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(labels), generator=generator)
    parts = dict(zip(("train", "val", "test"), order.split([1200, 250, 347]), strict=True))
    x = {name: images[index] for name, index in parts.items()}
    y = {name: labels[index] for name, index in parts.items()}
    if setting == "one class":
        forget = y["train"] == FORGOTTEN_CLASS
        for name in ("val", "test"):  # a model that never saw the class is judged on the others
            kept = y[name] != FORGOTTEN_CLASS
            x[name], y[name] = x[name][kept], y[name][kept]
    else:
        forget = torch.zeros(len(y["train"]), dtype=torch.bool)
        forget[: round(WRONG_SHARE * len(forget))] = True
        shift = torch.randint(1, 10, (int(forget.sum()),), generator=generator)
        y["train"][forget] = (y["train"][forget] + shift) % 10
    pairs = {name: TensorDataset(x[name], y[name]) for name in parts}
    chosen = {
        name: TensorDataset(x["train"][where], y["train"][where])
        for name, where in (("forget", forget), ("retain", ~forget))
    }
    return Split(**pairs, **chosen)


def shuffled(data: TensorDataset) -> DataLoader:
    """Training batches."""
    return DataLoader(data, batch_size=BATCH, shuffle=True)


def ordered(data: TensorDataset) -> DataLoader:
    """Evaluation batches."""
    return DataLoader(data, batch_size=512)


def train(data: TensorDataset, seed: int, epochs: int = 25) -> nn.Module:
    """The small ConvNet trained from scratch until it knows its training set by heart."""
    torch.manual_seed(seed)
    model = small_convnet()
    loader = shuffled(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
    return model


# Chosen by benchmarks/demo_settings.py, see above.
CHOSEN: dict[str, dict[str, dict[str, Any]]] = {
    "one class": {
        "FT": {"lr": 0.1},
        "GA": {"lr": 0.03},
        "SFR-on (paper)": {"cycles": 40, "forget_lr": 0.1, "lr": 0.05, "slow_lr": 0.5},
        "SFR-on (official)": {"cycles": 40, "forget_weight": 1.0},
    },
    "wrong labels": {
        "FT": {"lr": 0.1},
        "GA": {"lr": 0.03},
        "SFR-on (paper)": {"cycles": 40, "forget_lr": 0.15, "lr": 0.05, "slow_lr": 0.5},
        "SFR-on (official)": {"cycles": 40, "forget_weight": 1.0},
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
    on_cycle: Callable[[int, nn.Module], None] | None = None,
) -> Unlearned:
    """Run FT, GA or an SFR-on recipe on a copy of ``original``."""
    model = copy.deepcopy(original)
    torch.manual_seed(2000 + seed)
    if method in ("FT", "GA"):
        with Stopwatch() as watch:
            if method == "FT":
                finetune(model, shuffled(split.retain), **settings)
            else:
                gradient_ascent(model, shuffled(split.forget), **settings)
        return Unlearned(model, watch.seconds)
    recipe = (Recipe.paper if method == "SFR-on (paper)" else Recipe.official)(**settings)
    result = unlearn(model, shuffled(split.retain), shuffled(split.forget), recipe=recipe, on_cycle=on_cycle)
    return Unlearned(model, result.seconds, result.mask)


def run_one(setting: str, seed: int, done: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Every method in one setting with one seed: metrics, and for the figures curves, losses, mask densities."""
    split = make_split(setting, seed)
    loaders = {f"{n}_loader": ordered(getattr(split, n)) for n in ("forget", "retain", "test")}
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
        curve: list[tuple[float, float]] = []

        def look(cycle: int, model: nn.Module, curve: list[tuple[float, float]] = curve) -> None:
            if cycle % 4 == 0:
                curve.append(_point(model, split))

        unlearned = apply_method(method, CHOSEN[setting][method], original, split, seed, look)
        out["curves"][method] = [_point(original, split), *curve, _point(unlearned.model, split)]
        if unlearned.mask is not None:
            total = sum(unlearned.mask.counts().values()) / sum(map(unlearned.mask.size, unlearned.mask))
            out["density"][method] = (unlearned.mask.density(), total)
        record(method, unlearned.model, unlearned.seconds)
    return out


def _losses(evaluated: Evaluated) -> dict[str, list[float]]:
    return {name: per_sample_loss(getattr(evaluated, name)).tolist() for name in ("forget", "test")}


def _point(model: nn.Module, split: Split) -> tuple[float, float]:
    forget, retain = (accuracy(predict(model, ordered(d))) for d in (split.forget, split.retain))
    return forget, retain


# --- running everything, two processes at a time ------------------------------------------------------------------

_ticks: Any = None


def _start_worker(ticks: Any) -> None:
    global _ticks
    _ticks = ticks
    torch.set_num_threads(1)


def _work(job: tuple[str, int]) -> dict[str, Any]:
    return run_one(*job, done=lambda: _ticks.put(1))


def run_all(jobs: list[tuple[str, int]], workers: int, progress: bool = True) -> dict[tuple[str, int], dict[str, Any]]:
    """``run_one`` for every (setting, seed), each in a process of its own with one thread."""
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    with ProcessPoolExecutor(workers, context, _start_worker, (ticks,)) as pool:
        futures = {job: pool.submit(_work, job) for job in jobs}
        for _ in progress_bar(_until_done(futures, ticks), range(len(jobs) * (len(METHODS) + 1)), "Demo", progress):
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
    "one class": f"scikit-learn digits, small ConvNet; forget every {FORGOTTEN_CLASS}; tested on the other classes",
    "wrong labels": "scikit-learn digits, small ConvNet; forget the 10 % of the training samples with wrong labels",
}
NOTES = [
    "Settings of every method were chosen on validation data with other seeds (benchmarks/demo_settings.py), never "
    "on the test set or the retrained model.",
    "RTE was measured with one thread, as many runs at a time as there are cores.",
]


def _figures(runs: dict[tuple[str, int], dict[str, Any]], seed: int) -> dict[str, Any]:
    """Trade-off, loss histograms, mask density (one seed) and times (all seeds), per setting."""
    from . import figures

    made = {}
    for setting in SETTINGS:
        run, name = runs[setting, seed], setting.replace(" ", "_")
        reference = run["metrics"]["Retrain"]
        made[f"tradeoff_{name}"] = figures.tradeoff(run["curves"], (reference["FA"], reference["RA"]))
        shown = ("Original", "SFR-on (paper)", "SFR-on (official)", "Retrain")
        made[f"losses_{name}"] = figures.loss_histograms({m: run["losses"][m] for m in shown})
        made[f"mask_{name}"] = figures.mask_density(*run["density"]["SFR-on (paper)"])
        times = {m: [r["metrics"][m]["RTE"] for (s, _), r in runs.items() if s == setting] for m in METHODS[1:]}
        made[f"time_{name}"] = figures.time_per_method(
            {m: (statistics.mean(t), statistics.stdev(t) if len(t) > 1 else 0.0) for m, t in times.items()}
        )
    return made
