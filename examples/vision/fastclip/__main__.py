"""FastClip: exact spectral norms of layers, a bound on them, and what it does for AMUN.

    python -m examples.vision.fastclip [--seed N] [--out DIR] [--data FILE]

Norms from autograd are compared with those of the dense matrices, on layers of several kinds and on
a small convolutional network that has learnt 200 of scikit-learn's digits; all are then clipped to
half of their norm and compared again. Two such networks, one of them clipped to a bound while it
learns and unlearns, forget 20 of the digits by AMUN, in ten draws a seed, and each is judged by two
networks retrained as it was trained.
"""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.systems.claims import Claim, at_least, at_most, record, write
from examples.systems.images import load, options
from sfron_fast import methods

from ..amun.fixture import (
    CLASSES,
    Split,
    gap,
    mean,
    measured,
    shuffled,
    split,
    trained,
)
from .exact import Compared, compared, in_order, layers
from .figure import draw

OUT = Path("benchmarks/results/systems/fastclip")
TITLE = "FastClip: spectral norms of layers, and a bound on them"
SIZE, FORGOTTEN, REPEATS, WIDTHS = 200, 20, 10, (16, 32, 32)
TRAINING: dict[str, Any] = {"epochs": 40, "lr": 3e-3, "batch": 32}
EPOCHS = 10  # of unlearning
# the bound, and a rate of AMUN for each model, are the best of one grid on seed 7, by the gap
BOUND, RATES = 1.6, {"unclipped": 0.0007, "clipped": 0.02}
EVERY = 5  # passes of training from one clipping to the next, a divisor of all of them
SHARE = 0.5  # of its own norm, that a layer is clipped to where only norms are looked at
DIGITS, CLOSE, TWICE, NEAR = 5e-5, 1.05, 2.0, 0.02


def network(shape: Sequence[int]) -> nn.Sequential:
    """Logits of images [n, 1, height, width]; three convolutions, two of stride 2."""
    first, second, third = WIDTHS
    size = third * -(-shape[1] // 4) * -(-shape[2] // 4)
    return nn.Sequential(
        *(nn.Conv2d(1, first, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(first, second, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(second, third, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(size, CLASSES)),
    )


def clipping(image: Tensor, every: int) -> Callable[[nn.Module], None]:
    """Clips the model it is called with, at the first call and every so many after."""
    calls = 0

    def clip(model: nn.Module) -> None:
        nonlocal calls
        if calls % every == 0:
            methods.clip_spectral_norms(model, image, bound=BOUND)
        calls += 1

    return clip


def arm(parts: Split, image: Tensor, seed: int, clipped: bool) -> dict[str, Any]:
    """A network before and after AMUN, two retrained as it was trained, and its norms."""
    make = partial(network, image.shape[1:])

    def learn(data: Any, number: int) -> nn.Module:
        keep = {"keep": clipping(image, EVERY)} if clipped else {}
        return trained(make, data, seed=seed + number, **TRAINING, **keep)

    original = learn(parts.train, 0)
    again = [measured(learn(parts.retain, number), parts) for number in (1, 2)]
    adversarial = methods.adversarial_examples(original, [parts.forget.tensors])
    model, clip = copy.deepcopy(original), clipping(image, 1)
    torch.manual_seed(seed)
    methods.amun(
        model,
        forget=shuffled(parts.forget, FORGOTTEN),
        retain=shuffled(parts.retain, TRAINING["batch"]),
        adversarial=adversarial,
        epochs=EPOCHS,
        lr=RATES["clipped" if clipped else "unclipped"],
        on_epoch=(lambda _, model: clip(model)) if clipped else None,
    )
    return {
        "before": measured(original, parts),
        "AMUN": measured(model, parts),
        "retrained": mean(again),
        "norms": methods.spectral_norms(original, image),
        "distance": {"mean": float(adversarial.distances.mean())},
        "network": original,
    }


def run(seed: int, data: Path | None) -> dict[str, Any]:
    """One seed: its layers, draws of what is learnt and forgotten, weights and batches."""
    start = time.process_time()
    images, labels = load(data)
    each: dict[str, list[dict[str, Any]]] = {"unclipped": [], "clipped": []}
    for number in range(REPEATS):
        at = 10_000 * (seed + 1) + 10 * number
        parts = split(images, labels, SIZE, FORGOTTEN, at)
        for name, found in each.items():
            found.append(arm(parts, images[:1], at, name == "clipped"))
    first = each["unclipped"][0]["network"]
    norms = compared(layers(seed) | in_order(first, images[:1]), SHARE)
    arms: dict[str, Any] = {}
    for name, found in each.items():
        rows = {key: mean([f[key] for f in found]) for key in found[0] if key != "network"}
        gaps = {key: gap(rows[key], rows["retrained"]) for key in ("before", "AMUN")}
        arms[name] = rows | {"gaps": gaps}
        for key in ("before", "AMUN", "retrained"):
            print(f"{name:>10} {key:>9}", {k: round(v, 3) for k, v in rows[key].items()})
        print(gaps, rows["norms"], rows["distance"], flush=True)
    facts = {"data": "digits" if data is None else data.name, "layers": norms, "arms": arms}
    claims, controls = judged(norms, arms)
    return record(seed, claims, controls, facts, time.process_time() - start)


def judged(norms: Compared, arms: dict[str, Any]) -> tuple[list[Claim], list[Claim]]:
    """Claims and controls from what was measured."""
    gaps = {name: rows["gaps"]["AMUN"] for name, rows in arms.items()}
    wrong = max(row["exact"] / row["reshaped"] for row in norms.values() if "reshaped" in row)
    known = min(abs(rows["before"]["AUC"] - rows["retrained"]["AUC"]) for rows in arms.values())
    claims = [
        at_most("norm, relative error, at worst", max(r["error"] for r in norms.values()), DIGITS),
        at_most(
            "exact norm after clipping, by the bound, at worst",
            max(row["clipped, by the bound"] for row in norms.values()),
            CLOSE,
        ),
        at_most("gap after AMUN, clipped by unclipped", gaps["clipped"] / gaps["unclipped"], 1.0),
    ]
    controls = [
        at_least("exact norm by the reshaped kernel's, at worst", wrong, TWICE),
        Claim("before: membership AUC from Retrain's", known, f"> {NEAR:g}", known > NEAR),
    ]
    return claims, controls


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, OUT).parse_args(arguments)
    found = write(chosen.out, run(chosen.seed, chosen.data), TITLE)
    draw(found, chosen.out / "fastclip.png")


if __name__ == "__main__":
    main()
