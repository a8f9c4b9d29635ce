"""A diffusion model of digits forgets one of them; run it from the project's root:

    python -m examples.start.diffusion

Needs `.[eval]`. A small class-conditional model of scikit-learn's digits is trained on the spot and
made to draw the next digit where the one to be forgotten is asked for. A classifier that has only
seen real digits says what share of the drawn ones are what was asked for; before and after lie in
`--out` as pictures, a row for each class.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

import sfron_fast as sf
from examples.diffusion.denoisers import KEPT, Mlp
from examples.diffusion.digits import CLASSES, NULL, SHAPE, load, train_judge
from examples.diffusion.training import fit
from sfron_fast.evaluation.diffusion import evaluate_generation, sample, save_grid

BATCH, STEPS = 64, 20  # of sampling


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/start/diffusion"))
    parser.add_argument("--forget-class", type=int, default=3, choices=range(CLASSES))
    parser.add_argument("--steps", type=int, default=4000, help="of the training before")
    parser.add_argument("--cycles", type=int, default=24, help="of unlearning")
    parser.add_argument("--per-class", type=int, default=64, help="images that are judged")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Percent recognised of the forgotten class (FA) and of the others (RA), before and after."""
    options = parse(arguments)
    gone = options.forget_class
    others = [label for label in range(CLASSES) if label != gone]
    data, judge = load(), train_judge(load())

    torch.manual_seed(0)
    model = Mlp()
    everything = DataLoader(TensorDataset(data.images, data.labels), BATCH, shuffle=True)
    usual = sf.Denoising(KEPT, null=NULL, drop=0.1)
    fit(model, usual, everything, steps=options.steps, lr=1e-3)

    def judged(name: str) -> dict[str, float]:
        (found,) = evaluate_generation(
            model,
            task=usual,
            judge=judge,
            forget=[gone],
            retain=others,
            shape=SHAPE,
            per_class=options.per_class,
            steps=STEPS,
            guidance=(1.0,),
        )
        labels = torch.arange(CLASSES).repeat_interleave(8)
        images = sample(model, labels, task=usual, shape=SHAPE, steps=STEPS)
        options.out.mkdir(parents=True, exist_ok=True)
        save_grid(images, options.out / f"{name}.png", columns=8, scale=4)
        return {"FA": found.fa, "RA": found.ra}

    before = judged("before")
    sf.unlearn(
        model,
        forget=DataLoader(TensorDataset(*data.of(gone)), BATCH, shuffle=True),
        retain=DataLoader(TensorDataset(*data.of(gone, same=False)), BATCH, shuffle=True),
        recipe=sf.Recipe.diffusion(cycles=options.cycles),
        task=sf.Denoising(
            KEPT, null=NULL, drop=0.1, instead=sf.Relabel({gone: (gone + 1) % CLASSES})
        ),
    )
    after = judged("after")
    print(f"recognised: {gone} {before['FA']:.0f} % -> {after['FA']:.0f} %,", end=" ")
    print(f"the others {before['RA']:.0f} % -> {after['RA']:.0f} %; pictures in {options.out}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
