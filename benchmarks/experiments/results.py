"""The report of an experiment, from its pieces: table, JSON, figures, questions with answers."""

import json
import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import end_to_end
from benchmarks.harness import provenance
from sfron_fast.evaluation import figures
from sfron_fast.evaluation.report import Report
from sfron_fast.files import write_whole

from . import methods, plots
from .answers import answers
from .data import FORGET_SHARE, FORGOTTEN_CLASS, VAL_SHARE
from .pieces import Piece, Run
from .settings import CHOSEN, SCALES, chosen

CYCLES = "cycles.json"
Found = dict[Piece, dict[str, Any]]


def measure_cycles(run: Run) -> None:
    """Time whole cycles: fused, stock torch and the authors' style, on this device and scale."""
    scale, split = SCALES[run.scale], run.split(Piece("Original", 0))
    smoke = scale.name == "smoke"
    inside = methods.MixedPrecision if run.device == "cuda" else None  # as the methods' models
    size = (scale.width, scale.batch)
    rows = end_to_end.measure("ResNet-18", run.device, 2 if smoke else 15, size=size, inside=inside)
    whole = {
        "cycles": chosen(scale.name, "random")[methods.PAPER]["cycles"],
        "batches": sum(-(-len(images) // scale.batch) for images in (split.forget, split.retain)),
    }
    text = json.dumps(
        {"provenance": provenance(), "run": whole, "rows": [asdict(row) for row in rows]}, indent=1
    )
    write_whole(run.out / CYCLES, lambda to: to.write_text(text + "\n"))


def report(run: Run, pieces: list[Piece]) -> Report | None:
    """Write report, figures and README.md of what is done; None if no setting has a Retrain."""
    found: Found = {
        p: r for p in pieces if p.method != "Train" and (r := run.result(p)) is not None
    }
    retrained = {(p.setting, p.seed) for p in found if p.method == "Retrain"}
    table = {p: r for p, r in found.items() if not p.label and (p.setting, p.seed) in retrained}
    if not table:
        return None
    made = Report(_descriptions(run, {p.setting for p in table}), notes=_notes(run, table))
    for piece, result in table.items():
        made.add(piece.setting, piece.method, piece.seed, result["metrics"])
    drawn = {}
    for setting in dict.fromkeys(p.setting for p in table):
        drawn |= _figures({p: r for p, r in table.items() if p.setting == setting}, setting)
    sweeps = swept_points(found)
    for (setting, name), points in sweeps.items():
        reference = _mean(
            [
                r["metrics"]
                for p, r in table.items()
                if (p.setting, p.method) == (setting, "Retrain")
            ]
        )
        drawn[f"sweep_{setting}_{name}"] = plots.sweep(name, points, reference)
    made.save(run.out, drawn)
    cycles, selected = run.out / CYCLES, CHOSEN / f"{run.scale}.json"
    text = answers(made.to_dict(), sweeps, _json(cycles), _json(selected))
    write_whole(run.out / "README.md", lambda to: to.write_text(text))
    return made


def _json(path: Path) -> dict[str, Any]:
    """What a file holds, or nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


def swept_points(found: Found) -> dict[tuple[str, str], list[tuple[float, dict[str, float]]]]:
    """(setting, name) -> (value, mean metrics over seeds), in order of values."""
    grouped: dict[tuple[str, str], dict[float, list[dict[str, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for piece, result in found.items():
        if piece.label:
            name, value = piece.label.split("=")
            grouped[piece.setting, name][float(value)].append(result["metrics"])
    return {
        key: [(v, _mean(runs)) for v, runs in sorted(values.items())]
        for key, values in grouped.items()
    }


def _mean(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.fmean(run[name] for run in runs) for name in runs[0]}


def _descriptions(run: Run, settings: set[str]) -> dict[str, str]:
    scale, (train, test, _) = SCALES[run.scale], run.images()
    what = {
        "random": f"{FORGET_SHARE:.0%} of the training images, drawn by the seed",
        "class": f"class {FORGOTTEN_CLASS}; validated and tested on the other classes",
    }
    size = (
        f"{len(train)} training images ({VAL_SHARE:.0%} of them for validation), {len(test)} test"
        " images"
    )
    return {
        s: f"CIFAR-10, {size}, ResNet-18 of width {scale.width}; forget {what[s]}"
        for s in what
        if s in settings
    }


def _notes(run: Run, table: Found) -> list[str]:
    scale = SCALES[run.scale]
    path = CHOSEN / f"{run.scale}.json"
    how = (
        "chosen on validation data of another seed, the same number of candidates for each"
        if path.exists()
        else (
            "not chosen yet: a candidate from the middle of each grid"
            " (benchmarks/experiments/settings.py)"
        )
    )
    notes = [
        (
            f"Settings: {how}. Neither the test set nor Retrain had a say; checkpoints are the last"
            " ones."
        ),
        (
            f"Original and Retrain: {scale.epochs} epochs of SGD, one cycle of lr up to"
            f" {scale.lr:g}, batch {scale.train_batch}; flips and crops of up to {scale.crop}"
            " pixels."
        ),
    ]
    for setting in dict.fromkeys(p.setting for p in table):
        used = {p.method: p.settings for p in table if p.setting == setting and p.settings != "{}"}
        notes.append(
            f"Settings, {setting}: " + "; ".join(f"{m} {s}" for m, s in used.items()) + "."
        )
    origins = {
        json.dumps(
            {k: r["provenance"][k] for k in ("device", "gpu", "torch", "threads", "commit", "date")}
        )
        for r in table.values()
    }
    return [*notes, "Pieces were made by " + "; ".join(sorted(origins)) + "."]


def _figures(table: Found, setting: str) -> dict[str, Any]:
    """Paths and losses of the first seed, Avg.D and times of all."""
    first = min(p.seed for p in table)
    one = {p.method: r for p, r in table.items() if p.seed == first}
    reference = one["Retrain"]["metrics"] if "Retrain" in one else None
    curves = {
        m: [tuple(point) for point in r["curve"]] for m, r in one.items() if len(r["curve"]) > 1
    }
    made: dict[str, Any] = {}
    if curves and reference:
        made[f"tradeoff_{setting}"] = figures.tradeoff(
            {m: c for m, c in curves.items() if m not in methods.ABLATIONS},
            (reference["FA"], reference["RA"]),
        )
    shown = ("Original", "FT", "SalUn", methods.PAPER, methods.OFFICIAL, "Retrain")
    losses = {m: one[m]["losses"] for m in shown if m in one and one[m]["losses"]}
    if losses:
        made[f"losses_{setting}"] = figures.loss_histograms(losses)
    for metric, unit in (("Avg.D", "points"), ("D_KL_forget", "nats")):
        values = _spread(table, metric)
        values.pop("Retrain", None)
        if values:
            name = f"{metric.replace('.', '').lower()}_{setting}"
            made[name] = plots.bars(values, f"{metric} ({unit})")
    times = {m: v for m, v in _spread(table, "RTE").items() if m != "Original"}
    made[f"time_{setting}"] = figures.time_per_method(times)
    return made


def _spread(table: Found, metric: str) -> dict[str, tuple[float, float]]:
    """Method -> mean and standard deviation."""
    grouped: dict[str, list[float]] = defaultdict(list)
    for piece, result in table.items():
        grouped[piece.method].append(result["metrics"][metric])
    return {
        m: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0)
        for m, v in grouped.items()
    }
