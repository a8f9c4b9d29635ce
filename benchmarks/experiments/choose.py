"""`python -m benchmarks.experiments.choose`: settings of every method, on validation data.

Each method has the same number of candidates, along the setting that decides how strongly it
forgets. The choice is the candidate with the smallest sum of three misses, in points of accuracy:
how far the forget set is from what a model that never saw it is expected to reach (for random
samples the original's validation accuracy, for a class 0), and what retain and validation set lose
against the original. Neither the test set nor a retrained model is touched, and the seed is none of
the experiment's. Writes chosen/SCALE.json, with every candidate's accuracies.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import provenance
from sfron_fast.files import write_whole

from .methods import TUNED
from .pieces import Clock, Piece, Run, run_all, validate, with_settings
from .settings import CHOSEN, GRIDS, SCALES, SETTINGS

SEED = 100


def miss(found: Mapping[str, float], original: Mapping[str, float], setting: str) -> float:
    """The sum of the three misses, in points."""
    wanted = 0.0 if setting == "class" else original["VA"]
    return abs(found["FA"] - wanted) + sum(
        max(0.0, original[name] - found[name]) for name in ("RA", "VA")
    )


def main() -> None:
    """Run every candidate and write down the best."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experiments.choose", description=__doc__
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scale", choices=list(SCALES), required=True)
    parser.add_argument("--setting", choices=SETTINGS, help="only this one (default: both)")
    parser.add_argument("--out", type=Path, help="default: build/cifar10/choose-SCALE")
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--workers", type=int)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = args.workers or (1 if device == "cuda" else len(os.sched_getaffinity(0)))
    run = Run(args.data, args.out or Path(f"build/cifar10/choose-{args.scale}"), args.scale, device)
    settings = [args.setting] if args.setting else list(SETTINGS)
    candidates = {
        (setting, method): [
            with_settings(
                Piece(method, SEED, setting, label=f"candidate{i}", judged="val"), candidate
            )
            for i, candidate in enumerate(GRIDS[args.scale][method])
        ]
        for setting in settings
        for method in TUNED
    }
    every = [piece for pieces in candidates.values() for piece in pieces]
    if not run_all(run, [[Piece("Train", SEED)], every], workers, Clock(args.max_minutes)):
        print("not all done: run the same command again to go on")
        return
    path = CHOSEN / f"{args.scale}.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"settings": {}}
    record |= {
        "provenance": provenance(),
        "rule": (__doc__ or "").split("\n\n")[1].replace("\n", " "),
        "seed": SEED,
    }
    for setting in settings:
        start = Piece("Train", SEED)
        original = validate(run.model(start), run.split(Piece("Original", SEED, setting)))
        record["settings"][setting] = {"Original": original}
        for method in TUNED:
            rows = []
            for piece in candidates[setting, method]:
                found = run.result(piece)
                assert found is not None
                rows.append(
                    {
                        "settings": json.loads(piece.settings),
                        **found["metrics"],
                        "seconds": found["seconds"],
                        "miss": miss(found["metrics"], original, setting),
                    }
                )
            best = min(rows, key=lambda row: row["miss"])
            record["settings"][setting][method] = {"chosen": best["settings"], "candidates": rows}
            print(f"{setting}, {method}: {best}")
    path.parent.mkdir(exist_ok=True)
    write_whole(path, lambda to: to.write_text(json.dumps(record, indent=1) + "\n"))


if __name__ == "__main__":
    main()
