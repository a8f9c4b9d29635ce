"""A DDPM of digits forgets a class: SFR-on, its parts, and other methods, each against Retrain.

    python -m examples.diffusion.ddpm --model mlp --classes tested --seeds 0 1 2

Settings (``compare_settings``) were chosen on classes 1, 2, 4, 6 and 7; ``--classes tested`` are
the others. Models are kept in ``--out`` and not trained twice; results go to ``results.json``
there, and the images of each arm into a picture.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfron_fast.evaluation.diffusion import evaluate_generation, sample, save_grid
from sfron_fast.evaluation.relearning import relearned

from .compare_arms import ARMS, Settings
from .compare_common import PER_CLASS, SAMPLING, Batches, Setting, task
from .compare_settings import settings
from .denoisers import MODELS
from .digits import CHOSEN, CLASSES, SHAPE, TESTED, Digits, Judge, load, train_judge
from .training import fit

SHOWN = (
    "SFR-on",
    "SFR-on, no mask",
    "SFR-on, ascent",
    "ascent, no mask",
    "ascent, raw adaptive",
    "ascent, no slow step",
    "SalUn",
    "ESD",
    "DiMUM",
    "fine-tuning",
)


def train(kind: str, images: Tensor, labels: Tensor, seed: int, scale: float) -> nn.Module:
    """Adam, its rate falling to 0 on a cosine; one condition in ten is dropped."""
    make, steps, lr = MODELS[kind]
    steps = max(1, int(steps * scale))
    torch.manual_seed(seed)
    model, one = make(), task(seed)
    return fit(model, one, Batches(images, labels, seed), steps=steps, lr=lr)


def kept(path: Path, make: Callable[[], nn.Module], empty: nn.Module) -> tuple[nn.Module, float]:
    """A model from ``path``, or made and kept there; and the CPU seconds of making it."""
    if not path.exists():
        begun = time.process_time()
        model = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "seconds": time.process_time() - begun}, path)
    saved = torch.load(path, weights_only=True)
    empty.load_state_dict(saved["model"])
    return empty.eval(), saved["seconds"]


def changed(name: str, setting: Setting, chosen: Settings | None = None) -> tuple[nn.Module, float]:
    """What an arm makes of the base, and its CPU seconds, the mask it asked for included."""
    model, setting.charged = copy.deepcopy(setting.base), 0.0
    begun = time.process_time()
    made = ARMS[name](model, setting, settings(name) if chosen is None else chosen)
    seconds = time.process_time() - begun + setting.charged
    return (model if made is None else made), seconds


def judged(
    model: nn.Module,
    data: Digits,
    judge: Judge,
    label: int,
    guidance: tuple[float, ...] = (0.0, 1.0),
) -> list[dict[str, Any]]:
    """FA, RA, distance, realism and saturation at each guidance."""
    others = [c for c in range(CLASSES) if c != label]
    found = evaluate_generation(
        model,
        task=task(0),
        judge=judge,
        forget=[label],
        retain=others,
        shape=SHAPE,
        per_class=PER_CLASS,
        guidance=guidance,
        **SAMPLING,
        features=judge.features,
        real=data.held_out[data.held_out_labels != label],
    )
    return [entry._asdict() for entry in found]


def attacks(
    model: nn.Module, data: Digits, label: int, stops: Sequence[int], seed: int
) -> Iterator[tuple[int, nn.Module]]:
    """Copies after so many steps of training on images of the other classes alone, which brings a
    class back that was hidden and not forgotten. Adam begins anew at each stop, batches go on.
    """
    batches = Batches(*data.of(label, same=False), seed + 2)
    one, done = task(seed + 2), 0
    for stop in stops:
        model = relearned(model, batches, steps=stop - done, lr=1e-3, task=one)
        done = stop
        yield stop, model


def picture(model: nn.Module, path: Path) -> None:
    """Ten images of each class, a row each."""
    labels = torch.arange(CLASSES).repeat_interleave(10)
    images = sample(model, labels, task=task(0), shape=SHAPE, **SAMPLING)
    save_grid(images, path, columns=10, scale=4)


def main(arguments: list[str] | None = None) -> None:
    """One row of figures for each class, seed and arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="mlp")
    parser.add_argument(
        "--classes", nargs="+", default=["tested"], help="chosen, tested, or digits"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", default=[], help="names of arms, and Retrain")
    parser.add_argument("--attack", type=int, default=0, help="steps on the other classes, after")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps of training")
    parser.add_argument("--out", type=Path, default=Path("build/diffusion"))
    given = parser.parse_args(arguments)
    named = {"chosen": CHOSEN, "tested": TESTED}
    classes = [c for word in given.classes for c in named.get(word) or (int(word),)]
    data = load()
    make = MODELS[given.model][0]
    judge_of, _ = kept(given.out / "judge.pt", lambda: train_judge(data), Judge())
    rows: list[dict[str, Any]] = []

    def note(name: str, model: nn.Module, label: int, seed: int, seconds: float) -> None:
        for entry in judged(model, data, judge_of, label):
            row = {"arm": name, "class": label, "seed": seed, "cpu_seconds": seconds, **entry}
            rows.append({"model": given.model, **row})
            print(
                f"class {label} seed {seed} w {entry['guidance']:.0f}  {name:24}"
                f" FA {entry['fa']:5.1f}  RA {entry['ra']:5.1f}  FD {entry['distance']:6.2f}"
                f"  real {entry['realism']:5.1f}  {seconds:6.2f} s",
                flush=True,
            )
        picture(model, given.out / f"{given.model}_{label}_{seed}_{name.replace(' ', '_')}.png")

    for seed in given.seeds:
        name = f"{given.model}_{given.scale:g}_{seed}"
        everything = data.images, data.labels
        base, seconds = kept(
            given.out / f"{name}_base.pt",
            lambda seed=seed, everything=everything: train(
                given.model, *everything, seed, given.scale
            ),
            make(),
        )
        for label in classes:
            note("base", base, label, seed, seconds)
            if not given.only or "Retrain" in given.only:
                rest = data.of(label, same=False)
                retrained, seconds = kept(
                    given.out / f"{name}_without_{label}.pt",
                    lambda seed=seed, rest=rest: train(given.model, *rest, seed, given.scale),
                    make(),
                )
                note("Retrain", retrained, label, seed, seconds)
            setting = Setting(base, data, label, seed, judge_of)
            for arm in SHOWN:
                if given.only and arm not in given.only:
                    continue
                model, seconds = changed(arm, setting)
                note(arm, model, label, seed, seconds)
                if given.attack:
                    for _, after in attacks(model, data, label, [given.attack], seed):
                        note(f"{arm}, attacked", after, label, seed, 0.0)
            (given.out / "results.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
