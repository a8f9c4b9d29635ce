"""A DDPM of digits forgets a class: SFR-on, its parts, and other methods, each against Retrain.

    python -m examples.diffusion.ddpm --model mlp --classes tested --seeds 0 1 2

Settings are those of the recipes, chosen on classes 1, 2, 4, 6 and 7; ``--classes tested`` are the
others. Models are kept in ``--out`` and not trained twice; results go to ``results.json`` there,
and the images of each arm into a picture.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sfron_fast as sf
from sfron_fast import methods
from sfron_fast.evaluation.diffusion import evaluate_generation, sample, save_grid
from sfron_fast.evaluation.relearning import relearned

from .denoisers import KEPT, MODELS
from .digits import CHOSEN, CLASSES, NULL, SHAPE, TESTED, Digits, Judge, load, train_judge
from .training import fit

BATCH = 64
SAMPLING = {"steps": 20, "clamp": 1.0}
PER_CLASS = 46  # images judged
PASSES = 48  # backward passes of every method


def task(seed: int, **settings: Any) -> sf.Denoising:
    """Of every arm."""
    return sf.Denoising(KEPT, null=NULL, seed=seed, **settings)


class Batches:
    """Shuffled batches of ``BATCH`` images, another order each pass."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, share: float = 1.0) -> None:
        self.images, self.labels, self.share = images, labels, share  # of a pass, to stop after
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.labels), generator=self.generator)
        for rows in order[: int(self.share * len(order))].split(BATCH):
            yield self.images[rows], self.labels[rows]


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


def arms(data: Digits, label: int, seed: int) -> dict[str, Callable[[nn.Module], None]]:
    """By name, what changes a copy of the base model in place."""
    forget, retain = data.of(label), data.of(label, same=False)
    following = (label + 1) % CLASSES

    def sets() -> dict[str, Batches]:
        return {"forget": Batches(*forget, seed), "retain": Batches(*retain, seed + 1)}

    def run(
        recipe: sf.Recipe, select: Callable[[nn.Module], sf.SaliencyMask] | None = None, **of: Any
    ) -> Callable[[nn.Module], None]:
        """``of``: settings of the task, or functions of the model that make them."""

        def change(model: nn.Module) -> None:
            mask = None if select is None else select(model)
            given = {k: v(model) if callable(v) else v for k, v in of.items()}
            sf.unlearn(model, **sets(), recipe=recipe, mask=mask, task=task(seed, **given))

        return change

    def by_gradient(model: nn.Module) -> sf.SaliencyMask:
        return methods.gradient_saliency(model, sets()["forget"], 0.5, task=task(seed))

    def profile(model: nn.Module) -> Any:
        return sf.loss_profile(model, sets()["retain"], task=task(seed))

    def finetune(model: nn.Module) -> None:
        share = PASSES * BATCH / len(retain[1])
        few = Batches(*retain, seed + 1, min(1.0, share))
        settings = {"optimizer": "adamw", "weight_decay": 0.0, "cosine": False}
        one = task(seed)
        one.begin(model, 0, 1)
        epochs = max(1, round(share))
        methods.finetune(model, few, task=one, epochs=epochs, lr=1e-3, **settings)

    relabel = sf.Relabel(following)
    replace, ascent = sf.Recipe.diffusion(), sf.Recipe.diffusion_ascent()
    alternatives = data.of(following)[0]
    return {
        "SFR-on": run(replace, instead=relabel),
        "SFR-on without mask": run(replace.without("saliency"), instead=relabel),
        "SFR-on, ascent": run(ascent, reference=profile),
        "ascent without mask": run(ascent.without("saliency"), reference=profile),
        "ascent, raw adaptive": run(ascent.replace(ceiling=None)),
        "ascent without slow": run(ascent.without("fast_slow"), reference=profile),
        "SalUn": run(replace.replace(mask_semantics="update"), select=by_gradient, instead=relabel),
        "ESD": run(
            replace.without("saliency"),
            instead=lambda model: sf.Unconditional(copy.deepcopy(model)),
        ),
        "DiMUM": run(replace.without("saliency"), instead=sf.Memorise(alternatives)),
        "fine-tuning": finetune,
    }


def judged(model: nn.Module, data: Digits, judge: Judge, label: int) -> list[dict[str, Any]]:
    """FA, RA, distance, realism and saturation, at guidance 0 and 1."""
    others = [c for c in range(CLASSES) if c != label]
    found = evaluate_generation(
        model,
        task=task(0),
        judge=judge,
        forget=[label],
        retain=others,
        shape=SHAPE,
        per_class=PER_CLASS,
        **SAMPLING,
        features=judge.features,
        real=data.held_out[data.held_out_labels != label],
    )
    return [entry._asdict() for entry in found]


def attacked(model: nn.Module, data: Digits, label: int, steps: int, seed: int) -> nn.Module:
    """A copy after training on images of the other classes alone, which brings a class back that
    was hidden and not forgotten.
    """
    batches = Batches(*data.of(label, same=False), seed + 2)
    one = task(seed + 2)
    return relearned(model, batches, steps=steps, lr=1e-3, task=one)


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
            for arm, change in arms(data, label, seed).items():
                if given.only and arm not in given.only:
                    continue
                model = copy.deepcopy(base)
                begun = time.process_time()
                change(model)
                note(arm, model, label, seed, time.process_time() - begun)
                if given.attack:
                    model = attacked(model, data, label, given.attack, seed)
                    note(f"{arm}, attacked", model, label, seed, 0.0)
            (given.out / "results.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
