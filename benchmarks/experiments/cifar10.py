"""The paper's comparison, for real.

`python -m benchmarks.experiments.cifar10 --data PATH --scale smoke|small|full` pretrains a
ResNet-18, retrains it without the forget set, runs every method from the same start, evaluates, and
writes table, JSON and figures to --out. What is done is kept: run it again to go on, or after
``--max-minutes`` stopped it.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from . import methods, results
from .pieces import Clock, Piece, Run, run_all, with_settings
from .settings import SCALES, SETTINGS, SWEEPS, chosen, swept


def plan(scale: str, settings: Sequence[str], seeds: int, sweep: bool) -> list[list[Piece]]:
    """Phases; a phase needs what those before it made."""
    places = [(setting, seed) for seed in range(seeds) for setting in settings]
    found = {setting: chosen(scale, setting) for setting in settings}
    phases = [
        [Piece("Train", seed) for seed in range(seeds)],
        [Piece("Retrain", seed, setting) for setting, seed in places],
        [Piece("Original", seed, setting) for setting, seed in places]
        + [
            with_settings(Piece(method, seed, setting), found[setting][methods.owner(method)])
            for setting, seed in places
            for method in methods.METHODS
        ],
    ]
    if sweep:
        phases.append(
            [
                with_settings(
                    Piece(methods.PAPER, seed, setting, label=f"{name}={value:g}"),
                    swept(found[setting][methods.PAPER], name, value),
                )
                for setting, seed in places
                for name, values in SWEEPS.items()
                for value in values
            ]
        )
    return phases


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run, print the table, write the report; returns its folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments.cifar10", description=__doc__
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="CIFAR-10: folder of the python archive, or an .npz",
    )
    parser.add_argument("--scale", choices=list(SCALES), required=True)
    parser.add_argument("--setting", choices=SETTINGS, help="only this one (default: both)")
    parser.add_argument("--seeds", type=int, help="how many (default: 3, smoke 1)")
    parser.add_argument("--out", type=Path, help="default: build/cifar10/SCALE")
    parser.add_argument("--max-minutes", type=float, help="begin no piece that may end later")
    parser.add_argument("--workers", type=int, help="processes (default: one per core, on a GPU 1)")
    parser.add_argument(
        "--sweep", action="store_true", help="also the sweeps around SFR-on (paper)'s settings"
    )
    parser.add_argument(
        "--rte", action="store_true", help="also the time of a cycle against the authors' style"
    )
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = args.workers or (1 if device == "cuda" else len(os.sched_getaffinity(0)))
    run = Run(args.data, args.out or Path("build/cifar10") / args.scale, args.scale, device)
    settings = [args.setting] if args.setting else list(SETTINGS)
    seeds = args.seeds or SCALES[args.scale].seeds
    phases = plan(args.scale, settings, seeds, args.sweep)
    clock = Clock(args.max_minutes)
    finished = run_all(run, phases, workers, clock)
    if args.rte and finished and clock.allows_another():
        results.measure_cycles(run)
    report = results.report(run, [piece for phase in phases for piece in phase])
    print(report.table() if report else "nothing to report yet")
    print(
        f"all done; results in {run.out}"
        if finished
        else "not all done: run the same command again to go on"
    )
    return run.out


if __name__ == "__main__":
    main()
