"""A diffusion transformer of digits forgets a class, by the arms of ``ddpm``.

    python -m examples.diffusion.dit --forget 3

A page, ``dit.md``, and a picture of the base, Retrain and SFR-on go to ``--results``; models and
all pictures to ``--out``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import ddpm
from .training import table, write

RESULTS = Path("benchmarks/results/diffusion")
SHOWN = ("base", "Retrain", "SFR-on")
Limits = tuple[str, float, float]  # figure, least, most; all at guidance 1
INF = float("inf")
# of the base model, before anything is said of forgetting
BASE: list[Limits] = [("fa", 97.0, INF), ("ra", 98.0, INF), ("distance", -INF, 1.1)]
CLAIMS: dict[str, list[Limits]] = {  # the distance is at most so many times Retrain's
    "SFR-on": [("fa", -INF, 10.0), ("ra", 99.0, INF), ("distance", -INF, 1.15)],
    "SFR-on, ascent": [("fa", -INF, 15.0), ("ra", 99.0, INF), ("distance", -INF, 1.15)],
}
SHORT = {"fa": "FA", "ra": "RA", "distance": "FD"}


def missed(figures: dict[str, Any], limits: Sequence[Limits], unit: float = 1.0) -> str:
    """What is not within its limits, distances in ``unit``; "" = nothing."""
    found = []
    for key, least, most in limits:
        value, scale = figures[key], unit if key == "distance" else 1.0
        if not least * scale <= value <= most * scale:
            edge = f"< {least * scale:g}" if value < least * scale else f"> {most * scale:.3g}"
            found.append(f"{SHORT[key]} {value:.4g} {edge}")
    return ", ".join(found)


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence on the base model, and one on each claim."""
    at = {row["arm"]: row for row in rows if row["guidance"] == 1.0}
    found = [("the base model", missed(at["base"], BASE))]
    unit = at["Retrain"]["distance"]
    found += [(arm, missed(at[arm], limits, unit)) for arm, limits in CLAIMS.items()]
    return [f"{name} {f'misses: {what}' if what else 'holds its gate'}" for name, what in found]


def by_arm(rows: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """A line for each arm: figures at guidance 1, then 0, and the CPU seconds."""
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        at = {row["guidance"]: row for row in rows if row["arm"] == arm}
        figures = [at[w][key] for w in (1.0, 0.0) for key in ("fa", "ra", "distance")]
        figures[2::3] = [f"{distance:.2f}" for distance in figures[2::3]]
        lines.append([arm, *figures, at[1.0]["realism"], at[1.0]["cpu_seconds"]])
    return lines


def side_by_side(paths: Sequence[Path], goal: Path) -> None:
    """Pictures of one height, a margin between."""
    from matplotlib.image import imread, imsave

    parts = [imread(path)[..., :3] for path in paths]
    margin = np.ones((len(parts[0]), 12, 3), parts[0].dtype)
    goal.parent.mkdir(parents=True, exist_ok=True)
    imsave(goal, np.concatenate([p for part in parts for p in (part, margin)][:-1], 1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forget", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps of training")
    parser.add_argument("--out", type=Path, default=Path("build/diffusion"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    one = ["--classes", str(given.forget), "--seeds", str(given.seed), "--scale", str(given.scale)]
    ddpm.main(["--model", "dit", *one, "--out", str(given.out)])
    report(given.out, given.results, given.forget, given.seed)


def report(out: Path, results: Path, forget: int, seed: int) -> None:
    """The page and the picture of what lies in ``out``."""
    rows = json.loads((out / "results.json").read_text())
    shown = ("FA", "RA", "FD", "FA, w 0", "RA, w 0", "FD, w 0", "realism")
    text, said = table(["arm", *shown, "CPU s"], by_arm(rows)), verdicts(rows)
    print(text, *said, sep="\n")
    pictures = [out / f"dit_{forget}_{seed}_{arm}.png" for arm in SHOWN]
    side_by_side(pictures, results / "dit.png")
    write(
        results / "dit.md",
        f"A diffusion transformer forgets the digit {forget}",
        text,
        [
            "FA, RA: percent of the forgotten class's and of the others' images that an independent"
            " judge takes for their class; FD: Frechet distance of the others' features from"
            " held-out images; guidance w = 1, then 0.",
            f"At w = 1: {'; '.join(said)}.",
            f"One model, one class, seed {seed}; the recipes' settings were chosen on an MLP and"
            " other classes. CPU seconds include the masks.",
            f"![{', '.join(SHOWN)}: ten images of each class](dit.png) {', '.join(SHOWN)}.",
        ],
    )


if __name__ == "__main__":
    main()
