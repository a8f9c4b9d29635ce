"""The questions of the experiment, answered in words and numbers from its data alone."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import end_to_end, plots
from benchmarks.harness import Row

from . import methods

QUESTIONED = ("Avg.D", "D_KL_forget", "D_KL_retain", "D_KL_test")
Sweeps = Mapping[tuple[str, str], Sequence[tuple[float, Mapping[str, float]]]]


def answers(
    report: Mapping[str, Any],
    sweeps: Sweeps,
    measured: Mapping[str, Any],
    selected: Mapping[str, Any],
) -> str:
    """README.md of the results folder, from cycles.json and, if there, chosen/SCALE.json."""
    lines = [
        "# CIFAR-10: answers from the data",
        "",
        (
            "Made by `benchmarks/experiments/answers.py` from the data beside it; the tables and"
            " figures are in [report.md](report.md). ± is the standard deviation over seeds."
        ),
        "",
    ]
    for setting, means in report["settings"].items():
        lines += [f"## {setting}", "", report["descriptions"].get(setting, ""), ""]
        lines += (
            _closest(means) + _components(means) + _recipes(means) + _pairs(report["runs"], setting)
        )
    lines += _proposal(selected, report) + _sweeps(sweeps) + _cycles(measured)
    return "\n".join(lines)


def _value(means: Mapping[str, Any], method: str, metric: str) -> str:
    found = means[method][metric]
    return f"{found['mean']:.3g} ± {found['std']:.2g}"


def _closest(means: Mapping[str, Any]) -> list[str]:
    """Does SFR-on come closest to Retrain?"""
    compared = [m for m in means if m in methods.TUNED]
    if not compared:
        return []
    lines = ["**Does SFR-on come closest to Retrain?**", ""]
    for metric in QUESTIONED:
        ranked = sorted(compared, key=lambda m: means[m][metric]["mean"])
        best, ours = ranked[0], next((m for m in ranked if m in methods.RECIPES), None)
        text = ", ".join(f"{m} {_value(means, m, metric)}" for m in ranked[:3])
        if ours is not None:
            verdict = "yes" if best == ours else "no"
            text = (
                f"**{verdict}**, {ours} is number {ranked.index(ours) + 1} of {len(ranked)}. First:"
                f" {text}"
            )
        if "Original" in means:
            text += f"; the untouched model {_value(means, 'Original', metric)}"
        lines.append(f"- {metric}: {text}.")
    return [*lines, ""]


def _components(means: Mapping[str, Any]) -> list[str]:
    """What does each component buy?"""
    there = [m for m in methods.ABLATIONS if m in means]
    if methods.PAPER not in means or not there:
        return []
    lines = [
        "**What does each part buy?** (the paper's recipe less one part, same settings)",
        "",
        "| | FA | RA | TA | Avg.D | D_KL_forget |",
        "| :-- | --: | --: | --: | --: | --: |",
    ]
    for method in (methods.PAPER, *there):
        cells = (
            _value(means, method, metric) for metric in ("FA", "RA", "TA", "Avg.D", "D_KL_forget")
        )
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, ""]


def _recipes(means: Mapping[str, Any]) -> list[str]:
    """Paper against official against separate moments."""
    there = [m for m in methods.RECIPES if m in means]
    if len(there) < 2:
        return []
    lines = ["**The paper's recipe, the authors' code, or separate moments?**", ""]
    for m in there:
        values = (
            f"{name} {_value(means, m, name)}"
            for name in ("Avg.D", "D_KL_forget", "D_KL_retain", "RTE")
        )
        lines.append(f"- {m}: {', '.join(values)}.")
    return [*lines, ""]


def _pairs(runs: Sequence[Mapping[str, Any]], setting: str) -> list[str]:
    """Seed by seed, the difference in Avg.D between the best baseline and the best SFR-on."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["setting"] == setting and run["method"] in methods.TUNED:
            found.setdefault(run["method"], {})[run["seed"]] = run["metrics"]["Avg.D"]
    means = {m: statistics.fmean(v.values()) for m, v in found.items()}
    ours = min((m for m in means if m in methods.RECIPES), key=means.__getitem__, default=None)
    best = min((m for m in means if m in methods.BASELINES), key=means.__getitem__, default=None)
    if ours is None or best is None:
        return []
    seeds = sorted(found[ours].keys() & found[best].keys())
    gaps = [found[best][s] - found[ours][s] for s in seeds]
    return [
        f"Seed by seed, Avg.D of {best} (the best baseline) less that of {ours}: "
        + ", ".join(f"{g:+.2f}" for g in gaps)
        + f" (SFR-on closer in {sum(g > 0 for g in gaps)} of {len(gaps)}).",
        "",
    ]


def _proposal(selected: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """The settings chosen on validation data alone, without Retrain, and what came of them."""
    if not selected:
        return []
    lines = [
        "## Which settings to begin with?",
        "",
        (
            "By validation alone, with another seed (`benchmarks/experiments/choose.py`; the"
            " candidates are in settings.py beside it): a miss is in points of accuracy, summed"
            " over forget, retain and validation set. A method that misses little over a wide range"
            " is easy to set. Bold: the smallest; of equals the first is chosen."
        ),
        "",
    ]
    for setting, found in selected["settings"].items():
        misses = {
            m: [c["miss"] for c in entry["candidates"]]
            for m, entry in found.items()
            if m != "Original"
        }
        lines += [f"{setting}:", "", "| | misses, weak to strong | chosen |", "| :-- | :-- | :-- |"]
        for method in sorted(misses, key=lambda m: min(misses[m])):
            values = ", ".join(
                f"**{v:.1f}**" if v == min(misses[method]) else f"{v:.1f}" for v in misses[method]
            )
            settings = ", ".join(
                f"{name} {value:g}" for name, value in found[method]["chosen"].items()
            )
            lines.append(f"| {method} | {values} | {settings} |")
        lines += ["", *_kept(misses, report["settings"].get(setting, {})), ""]
    return lines


def _kept(misses: Mapping[str, Sequence[float]], means: Mapping[str, Any]) -> list[str]:
    """Whether the recipe that validation prefers is also the closest to Retrain."""
    ours = [m for m in methods.RECIPES if m in misses and m in means]
    if not ours:
        return []
    least = min(min(misses[m]) for m in ours)
    preferred, best = (
        [m for m in ours if min(misses[m]) == least],
        min(ours, key=lambda m: means[m]["Avg.D"]["mean"]),
    )
    told = ", ".join(f"{m} {_value(means, m, 'Avg.D')}" for m in ours)
    return [
        f"Of SFR-on's recipes validation prefers {' and '.join(preferred)}; closest to Retrain on"
        f" the test's seeds is {best} (Avg.D: {told})."
    ]


def _sweeps(sweeps: Sweeps) -> list[str]:
    """How sensitive is it?"""
    lines = ["## How sensitive is SFR-on (paper)?", ""] if sweeps else []
    for (setting, name), points in sweeps.items():
        scaled = ", times the chosen one, and the clip" if name == "forget_weight" else ""
        lines += [
            f"{name} ({setting}){scaled}:",
            "",
            f"| | {' | '.join(f'{value:g}' for value, _ in points)} |",
            "| :-- |" + " --: |" * len(points),
        ]
        for metric in ("FA", "RA", "TA", "Avg.D", "D_KL_forget"):
            lines.append(
                f"| {metric} | {' | '.join(f'{metrics[metric]:.3g}' for _, metrics in points)} |"
            )
        lines += ["", f"![sweep](sweep_{setting}_{name}.png)", ""]
    return lines


def _cycles(measured: Mapping[str, Any]) -> list[str]:
    """What share is the optimizer, and what does the fused path save?"""
    if not measured:
        return []
    rows, run = [Row(**row) for row in measured["rows"]], measured["run"]
    whole = {r.arm: r for r in rows if " cycle (" in r.case}
    phases = plots.phases(measured["rows"])
    cycle, fisher = (
        next(v for k, v in phases.items() if k.endswith(work)) for work in end_to_end.WORK
    )
    shared, of_fisher = (
        statistics.median(sum(p.get(n, 0.0) for n in plots.MODEL) for p in arms.values())
        for arms in (cycle, fisher)
    )
    batches = 2 * end_to_end.FISHER_BATCHES  # measured
    lines = [
        "## What a run costs",
        "",
        (
            f"{next(iter(whole.values())).case}: a forget step, then retain steps, the last with"
            " slow interpolation; arms in turn, medians (20th to 80th percentile). RTE is worked"
            f" out for a run: Fishers from {run['batches']} batches, a mask and {run['cycles']}"
            " cycles. Forward and backward are the same work in all arms; there it takes the"
            " median over arms, whose differences are the machine's."
        ),
        "",
        (
            "| | ms a cycle | its optimizer, ms | accumulation, ms a batch | mask, ms | RTE [s] |"
            " RTE over ours |"
        ),
        "| :-- | --: | --: | --: | --: | --: | --: |",
    ]
    cells, rte = {}, {}
    for arm, row in whole.items():
        optimizer = sum(ms for phase, ms in cycle[arm].items() if phase not in plots.MODEL)
        adding, build = fisher[arm]["accumulation"] / batches, fisher[arm]["mask build"]
        a_cycle, a_batch = shared + optimizer, of_fisher / batches + adding
        rte[arm] = (run["cycles"] * a_cycle + run["batches"] * a_batch + build) / 1e3
        cells[arm] = (
            f"{row.p50_ms:.0f} ({row.p20_ms:.0f} to {row.p80_ms:.0f}) | {optimizer:.2f} "
            f"({100 * optimizer / a_cycle:.1f} %) | {adding:.2f} | {build:.2f}"
        )
    lines += [
        f"| {a} | {cells[a]} | {rte[a]:.2f} | {rte[a] / rte['sfron_fast']:.2f}x |" for a in whole
    ]
    return [*lines, ""]
