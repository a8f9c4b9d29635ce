"""`sf.unlearn(model, forget=..., retain=...)` without a knob, beside the model and one retrained.

    python -m benchmarks.defaults --seeds 0 1 2 --out benchmarks/results/defaults.md

Digits of scikit-learn with wrong labels, a class, and random samples to forget; facts that a small
language model knows by heart; a class of a DDPM of the digits; and, with ``--cifar PATH`` (any form
of CIFAR-10 that ``benchmarks.experiments`` reads), a folder of 1,500 of its images. What
``unlearn`` does where nobody says was chosen on seeds 7 to 9 of these, and on MNIST.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import sfron_fast as sf

from .defaults_cases import Case, ddpm_case, digits_case, facts_case, folder_case
from .harness import provenance


def arms(case: Case) -> Iterator[tuple[str, dict[str, float], float, str]]:
    """(arm, percentages, CPU seconds, what it warned of)"""
    yield "before", case.judge(case.model), 0.0, ""
    if case.retrained is not None:
        yield "retrained", case.judge(case.retrained), 0.0, ""
    held = {} if case.holdout is None else {"holdout": case.holdout}
    for arm, more in {"unlearn": {}, "unlearn, with holdout": held}.items():
        if arm != "unlearn" and not held:
            continue
        model = copy.deepcopy(case.model)
        torch.manual_seed(0)
        begun = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result = sf.unlearn(model, **case.sets, **more, task=case.task, progress=False)
        seconds = time.process_time() - begun
        yield arm, case.judge(model), seconds, "; ".join(w.split(":")[0] for w in result.warnings)


def cases(seed: int, cifar: Path | None) -> Iterator[tuple[str, Callable[[], Case]]]:
    for kind in ("wrong labels", "one class", "random samples"):
        yield f"digits, {kind}", lambda kind=kind: digits_case(kind, seed)
    for kind in ("one class", "random samples") if cifar else ():
        with tempfile.TemporaryDirectory() as root:
            made = folder_case(kind, seed, cifar, Path(root))  # type: ignore[arg-type]
            yield f"image folder, {kind}", lambda made=made: made
    yield "language model, facts", lambda: facts_case(seed)
    label = (0, 3, 5, 8, 9)[seed % 5]
    yield "DDPM of digits, one class", lambda: ddpm_case(label, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cifar", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[tuple[dict[str, float], float, str]]] = {}
    for seed in chosen.seeds:
        for name, make in cases(seed, chosen.cifar):
            if chosen.only not in name:
                continue
            for arm, percents, seconds, said in arms(make()):
                found.setdefault((name, arm), []).append((percents, seconds, said))
                print(seed, name, arm, percents, f"{seconds:.1f} s", said, flush=True)
    if chosen.out is not None:
        chosen.out.write_text(page(found, chosen.seeds), encoding="utf-8")


def page(found: dict[Any, list[Any]], seeds: list[int]) -> str:
    """Means over the seeds, and the range where it is more than a point."""

    def cell(values: list[float]) -> str:
        mean = f"{statistics.mean(values):.1f}"
        wide = max(values) - min(values) > 1.0
        return f"{mean} ({min(values):.0f} to {max(values):.0f})" if wide else mean

    lines = [
        "# `unlearn` without a knob",
        "",
        "Accuracy in percent on the forget set, the retain set and unseen data (of answers, for the"
        " language model; images",
        "recognised, for the DDPM); means of seeds "
        + ", ".join(map(str, seeds))
        + ", and the range where it is more than a point. CPU seconds of one thread.",
        "",
        "| case | arm | forget | retain | test | CPU s | runs that warned |",
        "| --- | --- | --- | --- | --- | ---: | ---: |",
    ]
    for (name, arm), runs in found.items():
        columns = [
            cell([percents[part] for percents, _, _ in runs]) if part in runs[0][0] else ""
            for part in ("forget", "retain", "test")
        ]
        seconds = statistics.mean(s for _, s, _ in runs)
        warned = sum(bool(said) for _, _, said in runs)
        took = [f"{seconds:.1f}", f"{warned} of {len(runs)}"] if seconds else ["", ""]
        lines.append(f"| {' | '.join([name, arm, *columns, *took])} |")
    origin = provenance()
    lines += [
        "",
        "- " + ", ".join(f"{k} {origin[k]}" for k in ("device", "torch", "commit", "date")),
    ]
    how = "settings were chosen on seeds 7 to 9 and on MNIST"
    lines += [f"- `python -m benchmarks.defaults`; {how}."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
