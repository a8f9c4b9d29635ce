"""A DDPM of CIFAR-10 forgets a class, if the model is good enough to say anything about forgetting.

    python -m examples.diffusion.cifar10 --data PATH --scale full    # a GPU; needs diffusers
    python -m examples.diffusion.cifar10 --data PATH --scale small   # two cores: not good enough

PATH is the folder cifar-10-batches-py, or an .npz of JPEGs. The base model must have every class
recognised in at least 80 % of its images, at a Frechet distance of at most 2; else the run says
what was missed, reports nothing, and ends with an error.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfron_fast as sf
from benchmarks.cases.models import ResNet18
from benchmarks.experiments.data import MARGIN, Images
from benchmarks.experiments.data import load as load_images
from sfron_fast import methods
from sfron_fast.evaluation.diffusion import evaluate_generation, sample, save_grid

from .ddpm import Batches, kept, task
from .denoisers import UNet
from .digits import NULL, Digits, Judge, train_judge
from .training import fit, table

LEAST, MOST_FD = 80.0, 2.0
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Scale(NamedTuple):
    """Data, models and lengths; ``full`` is the paper's model and has not been run yet."""

    classes: tuple[int, ...]  # of CIFAR-10; they are called 0, 1, ... here
    side: int
    training: int | None  # images before classes are chosen, None = all
    steps: int
    lr: float
    per_class: int  # images judged
    sampling: dict[str, Any]
    network: Callable[[], nn.Module]
    judge: Callable[[], nn.Module]


def unet_of_the_paper() -> nn.Module:
    """The DDPM of Ho et al. (NeurIPS 2020) with classes, 35.7M weights."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise SystemExit("--scale full needs diffusers: pip install diffusers") from error

    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=NULL + 1,
    )


SCALES = {
    "full": Scale(
        classes=tuple(range(10)),
        side=32,
        training=None,
        steps=100_000,
        lr=2e-4,
        per_class=500,
        sampling={"steps": 50, "clamp": 1.0},
        network=unet_of_the_paper,
        judge=ResNet18,
    ),
    "small": Scale(
        classes=(1, 7, 8),
        side=16,
        training=10_000,
        steps=1500,
        lr=1e-3,
        per_class=50,
        sampling={"steps": 25, "clamp": 1.0},
        network=lambda: UNet(32, image_channels=3, levels=3),
        judge=lambda: Judge(3, (3, 16, 16)),
    ),
}


def load(path: Path, scale: Scale) -> Digits:
    """Images in [-1, 1] of the scale's classes, and held-out ones."""
    held = None if scale.training is None else scale.training // 5

    def those(images: Images) -> tuple[Tensor, Tensor]:
        pixels = images.pixels[:, MARGIN:-MARGIN, MARGIN:-MARGIN].permute(0, 3, 1, 2)
        x = F.adaptive_avg_pool2d(pixels.float(), scale.side).div(127.5).sub(1.0)
        chosen = torch.isin(images.labels, torch.tensor(scale.classes))
        places = torch.full((len(NAMES),), -1)
        places[list(scale.classes)] = torch.arange(len(scale.classes))
        return x[chosen], places[images.labels[chosen]]

    train, test, _ = load_images(path, scale.training, held, "cpu")
    return Digits(*those(train), *those(test))


def train_resnet(data: Digits, judge: nn.Module, device: torch.device) -> nn.Module:
    """With flips; the judge of the full scale."""
    torch.manual_seed(100)
    judge, epochs = judge.to(device), 30
    sgd = torch.optim.SGD(judge.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, epochs)
    for epoch in range(epochs):
        for x, labels in Batches(data.images, data.labels, epoch):
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x).to(device)
            sgd.zero_grad()
            F.cross_entropy(judge(x), labels.to(device)).backward()
            sgd.step()
        schedule.step()
    return judge.eval()


def recognised_shares(
    model: nn.Module, data: Digits, judge: Any, forget: int, scale: Scale
) -> tuple[float, float, float]:
    """FA, RA and Frechet distance at guidance 1."""
    others = [c for c in range(len(scale.classes)) if c != forget]
    device = next(model.parameters()).device
    with torch.no_grad():  # of the digits' judge 1
        unit = judge.features(data.images[:2000].to(device)).var(0).mean().sqrt()
    (found,) = evaluate_generation(
        model,
        task=task(0),
        judge=judge,
        forget=[forget],
        retain=others,
        shape=tuple(data.images.shape[1:]),
        per_class=scale.per_class,
        guidance=[1.0],
        features=lambda images: judge.features(images) / unit,
        real=data.held_out[data.held_out_labels != forget].to(device),
        **scale.sampling,
    )
    assert found.distance is not None
    return found.fa, found.ra, found.distance


def gate(model: nn.Module, data: Digits, judge: Any, scale: Scale) -> list[str]:
    """What the base model misses, in words."""
    missed, worst = [], 0.0
    for place, label in enumerate(scale.classes):
        share, _, distance = recognised_shares(model, data, judge, place, scale)
        worst = max(worst, distance)
        if share < LEAST:
            missed.append(f"{NAMES[label]} recognised in {share:.0f} % of its images")
    return missed + ([f"a Frechet distance of {worst:.1f}"] if worst > MOST_FD else [])


def arms(data: Digits, forget: int, count: int) -> dict[str, Callable[[nn.Module], Any]]:
    """By name, what changes a copy of the base model; of ``count`` classes."""
    instead = sf.Relabel((forget + 1) % count)
    sides = {"forget": data.of(forget), "retain": data.of(forget, same=False)}

    def run(recipe: sf.Recipe) -> Callable[[nn.Module], Any]:
        def change(model: nn.Module) -> None:
            sets = {name: Batches(*rows, 0) for name, rows in sides.items()}
            sf.unlearn(model, **sets, recipe=recipe, task=task(0, instead=instead))

        return change

    def finetune(model: nn.Module) -> None:
        adam: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.0, "cosine": False}
        methods.finetune(
            model, Batches(*sides["retain"], 0), task=task(0), epochs=1, lr=2e-4, **adam
        )

    recipe = sf.Recipe.diffusion()
    return {
        "SFR-on": run(recipe),
        "SFR-on, no mask": run(recipe.without("saliency")),
        "fine-tuning, one epoch": finetune,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, hold the gate, forget, print.

    Raises:
        SystemExit: the base model misses its gate.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scale", choices=list(SCALES), default="small")
    parser.add_argument(
        "--forget", type=int, default=0, help="a class, by its place in the scale's"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of training, in place of the scale's")
    parser.add_argument("--out", type=Path, default=Path("build/diffusion"))
    given = parser.parse_args(arguments)
    scale = SCALES[given.scale]
    steps = given.steps or scale.steps
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data, count = load(given.data, scale), len(scale.classes)
    train = train_judge if given.scale == "small" else None
    judge, _ = kept(
        given.out / f"cifar10_{given.scale}_judge.pt",
        lambda: train(data, 20, count) if train else train_resnet(data, scale.judge(), device),
        scale.judge().to(device),
    )

    def pretrained() -> nn.Module:
        torch.manual_seed(given.seed)
        batches = Batches(data.images, data.labels, given.seed)
        model = scale.network().to(device)
        return fit(model, task(given.seed), batches, steps=steps, lr=scale.lr)

    path = given.out / f"cifar10_{given.scale}_{steps}_{given.seed}.pt"
    base, seconds = kept(path, pretrained, scale.network().to(device))
    shown = torch.arange(count).repeat_interleave(10)
    shape = tuple(data.images.shape[1:])
    images = sample(base, shown, task=task(0), shape=shape, **scale.sampling)
    save_grid(images, path.with_suffix(".png"), columns=10, scale=2)
    missed = gate(base, data, judge, scale)
    if missed:
        raise SystemExit(
            f"nothing is reported: the base model misses its gate (every class >= {LEAST:.0f} %,"
            f" Frechet distance <= {MOST_FD:.0f}): {'; '.join(missed)}. Its images are in"
            f" {path.with_suffix('.png')}"
        )
    rows = {"base": (*recognised_shares(base, data, judge, given.forget, scale), seconds)}
    for name, change in arms(data, given.forget, count).items():
        model = copy.deepcopy(base)
        begun = time.perf_counter()
        change(model)
        spent = time.perf_counter() - begun
        rows[name] = (*recognised_shares(model, data, judge, given.forget, scale), spent)
    print(f"{NAMES[scale.classes[given.forget]]} forgotten, guidance 1, seed {given.seed}")
    print(table(["arm", "FA", "RA", "FD", "seconds"], [[n, *row] for n, row in rows.items()]))


if __name__ == "__main__":
    main()
