"""The comparison on digits: every arm on one base model and class after another, measured.

    python -m examples.diffusion.compare --choose           # settings, on classes 1 2 4 6 7
    python -m examples.diffusion.compare --seeds 0 1 2      # figures, on classes 0 3 5 8 9
    python -m examples.diffusion.compare_report

Writes a JSON file for each base model and class into ``--results`` after every arm; an arm that is
in it is not run again, so the run can be stopped anywhere. Models lie in ``--out`` and are not
trained twice. Seconds are CPU seconds of this process.
"""

import argparse
import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sfron_fast as sf
from sfron_fast.evaluation.diffusion import sample
from sfron_fast.saliency.overlap import overlap

from .compare_arms import ARMS, ATTACKED, METHODS, Settings
from .compare_common import SAMPLING, Setting, task
from .compare_settings import GRIDS, said, settings
from .ddpm import attacks, changed, judged, kept, train
from .denoisers import MODELS
from .digits import CHOSEN, CLASSES, SHAPE, TESTED, Digits, Judge, load, train_judge

RESULTS = Path("benchmarks/results/diffusion")
STOPS = (100, 300, 1000)  # steps of the attack
EACH = 2  # images of a class in the picture
CHOOSING = 3  # the base model that settings are chosen on


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="base models")
    parser.add_argument("--classes", nargs="+", type=int, default=list(TESTED))
    parser.add_argument("--arms", nargs="+", choices=["Retrain", *ARMS], default=list(ARMS))
    parser.add_argument("--choose", action="store_true", help="try learning rates instead")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps of training")
    parser.add_argument("--out", type=Path, default=Path("build/diffusion"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def environment(scale: float) -> dict[str, Any]:
    """What a row depends on beside seed, class and arm; rows of another one are refused."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sfron_fast": sf.__version__,
        "threads": torch.get_num_threads(),
        "scale": scale,
    }


class Results:
    """Rows of one base model and class, in a file.

    Raises:
        ValueError: the file is of other versions or settings.
    """

    def __init__(self, path: Path, seed: int, label: int, scale: float) -> None:
        wanted = environment(scale)
        self.path, self.seed, self.label = path, seed, label
        self.found: dict[str, Any] = {"seed": seed, "class": label, "environment": wanted}
        self.found["rows"] = {}
        if path.exists():
            self.found = json.loads(path.read_text())
            there = self.found["environment"]
            if there != wanted:
                raise ValueError(f"{path}: expected {wanted}, found {there}; use other --results")

    def __contains__(self, name: str) -> bool:
        return name in self.found["rows"]

    def note(self, name: str, row: dict[str, Any]) -> None:
        """Another row; the file is written whole or not at all."""
        self.found["rows"][name] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1) + "\n")
        os.replace(part, self.path)
        shown = "  ".join(
            f"w {w}: FA {of['fa']:5.1f} RA {of['ra']:5.1f} FD {of['fd']:5.2f}"
            for w, of in row.items()
            if w in ("0", "1")
        )
        back = " ".join(f"{at['fa']:.0f}" for at in row.get("attack", {}).values())
        print(
            f"seed {self.seed} class {self.label}  {name:28} {shown}"
            f"  {row.get('seconds', 0.0):6.2f} s  {back}",
            flush=True,
        )


class Pair:
    """A base model and a class: what is needed to run and to measure."""

    def __init__(self, base: nn.Module, data: Digits, judge: Judge, label: int, seed: int) -> None:
        self.data, self.judge, self.label, self.seed = data, judge, label, seed
        self.setting = Setting(base, data, label, seed, judge)

    def figures(
        self, model: nn.Module, guidance: tuple[float, ...] = (0.0, 1.0)
    ) -> dict[str, dict[str, float]]:
        """By guidance."""
        names = {"ra": "ra", "fa": "fa", "distance": "fd", "realism": "real"}
        names |= {"saturation": "saturated"}
        found = judged(model, self.data, self.judge, self.label, guidance)
        return {
            f"{of['guidance']:g}": {short: round(of[long], 3) for long, short in names.items()}
            for of in found
        }

    def row(self, model: nn.Module, name: str, seconds: float) -> dict[str, Any]:
        """Figures, cost, and what an attack brings back."""
        row: dict[str, Any] = {"seconds": round(seconds, 3), **self.figures(model)}
        if name in ATTACKED:
            stops = attacks(model, self.data, self.label, STOPS, self.seed)
            row["attack"] = {str(n): self.figures(after, (1.0,))["1"] for n, after in stops}
        return row

    def masks(self) -> dict[str, Any]:
        """Cost of the Fishers, and what two masks share that differ in the noise drawn alone."""
        mask = self.setting.mask()
        other = self.setting.fishers(task(self.seed).reseeded())
        selected = sum(mask.counts().values()) / sum(map(mask.size, mask))
        return {
            "seconds": round(self.setting.made["fishers"][1], 3),
            "density": round(selected, 4),
            "overlap": round(overlap(mask, sf.SaliencyMask.from_fisher(**other)), 4),
        }


def models(out: Path, data: Digits, seed: int, scale: float, without: int | None = None) -> Any:
    """The base model, or Retrain; and the CPU seconds of its training."""
    rows = (data.images, data.labels) if without is None else data.of(without, same=False)
    name = "base" if without is None else f"without_{without}"
    path = out / f"mlp_{scale:g}_{seed}_{name}.pt"
    return kept(path, lambda: train("mlp", *rows, seed, scale), MODELS["mlp"][0]())


def strip(model: nn.Module, path: Path) -> None:
    """A few images of each class, for the picture."""
    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    images = sample(model, labels, task=task(0), shape=SHAPE, **SAMPLING)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(images, path)


def compare(given: argparse.Namespace, data: Digits, judge: Judge, seed: int, label: int) -> None:
    """All rows of one pair that are missing."""
    path = given.results / f"seed{seed}_class{label}.json"
    results = Results(path, seed, label, given.scale)
    base, seconds = models(given.out, data, seed, given.scale)
    pair = Pair(base, data, judge, label, seed)
    if "base" not in results:
        results.note("base", pair.row(base, "base", seconds))
        strip(base, given.out / "strips" / f"{seed}_{label}_base.pt")
    if "masks" not in results.found:
        results.found["masks"] = pair.masks()
    if "Retrain" not in results:
        retrained, seconds = models(given.out, data, seed, given.scale, label)
        results.note("Retrain", pair.row(retrained, "Retrain", seconds))
        strip(retrained, given.out / "strips" / f"{seed}_{label}_Retrain.pt")
    for name in given.arms:
        if name in results or name == "Retrain":
            continue
        model, seconds = changed(name, pair.setting)
        results.note(name, {"settings": dict(settings(name)), **pair.row(model, name, seconds)})
        if name in METHODS or name == "noise":
            strip(model, given.out / "strips" / f"{seed}_{label}_{name}.pt")


def tried(arms: Iterable[str]) -> Iterator[tuple[str, str, Settings]]:
    """Arms, the names of their rows, and the settings that are tried."""
    for name in arms:
        yield from ((name, f"{name} @ {said(of)}", of) for of in GRIDS.get(name, ()))


def choose(given: argparse.Namespace, data: Digits, judge: Judge, label: int) -> None:
    """Rows of one class that settings are chosen on, an arm at each of its learning rates."""
    path = given.results / "choice" / f"class{label}.json"
    results = Results(path, CHOOSING, label, given.scale)
    base, seconds = models(given.out, data, CHOOSING, given.scale)
    pair = Pair(base, data, judge, label, CHOOSING)
    if "base" not in results:
        results.note("base", pair.row(base, "base", seconds))
    for name, row, chosen in tried(given.arms):
        if row not in results:
            model, seconds = changed(name, pair.setting, chosen)
            results.note(row, {"seconds": round(seconds, 3), **pair.figures(model)})


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    data = load()
    judge, _ = kept(given.out / "judge.pt", lambda: train_judge(data), Judge())
    if given.choose:
        for label in CHOSEN:
            choose(given, data, judge, label)
        return
    for seed in given.seeds:
        for label in given.classes:
            compare(given, data, judge, seed, label)


if __name__ == "__main__":
    main()
