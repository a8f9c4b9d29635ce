"""AMUN: nearest adversarial examples under the model's own wrong labels, against retraining.

    python -m examples.vision.amun [--seed N] [--out DIR] [--data FILE]

A small network learns 200 of scikit-learn's digits and forgets 20 of them, drawn at random; the
other 1,597 are the test set. One forget set is too small to judge by: everything is done for 20
draws a seed, and what is judged are means over them, of the reference over two models retrained in
each. FT, RL, AMUN and noise start from the same model, run ten epochs, and have each its own rate.
"""

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, TensorDataset

from examples.systems.claims import Claim, at_least, at_most, record, write
from examples.systems.images import load, options
from sfron_fast import methods
from sfron_fast.methods import Adversarial

from .figure import draw
from .fixture import CLASSES, Measured, Split, gap, mean, measured, shuffled, split, trained

OUT = Path("benchmarks/results/systems/amun")
TITLE = "AMUN: forgetting by nearest adversarial examples"
SIZE, FORGOTTEN, REPEATS, WIDTH = 200, 20, 20, 128
TRAINING: dict[str, Any] = {"epochs": 60, "lr": 3e-3, "batch": 32}
EPOCHS = 10  # of unlearning
# each the best of one grid on seed 7, by its gap; noise as AMUN, and with a rate of its own
RATES = {"FT": 0.2, "RL": 0.001, "AMUN": 0.015, "noise": 0.015, "noise, own rate": 0.0005}
NEAR, WORSE = 0.02, 2.0


def network(shape: Sequence[int]) -> nn.Module:
    """Logits of images [n, *shape]."""
    size = torch.Size(shape).numel()
    layers = [nn.Linear(size, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(WIDTH, CLASSES))


def noisy(parts: Split, adversarial: Adversarial, generator: torch.Generator) -> Adversarial:
    """Each sample as far away as its adversarial example, in a random direction, with its label."""
    x = parts.forget.tensors[0]
    drawn = torch.randn(x.shape, generator=generator).flatten(1)
    far = adversarial.distances[:, None] * drawn / drawn.norm(dim=1, keepdim=True)
    return adversarial._replace(inputs=x + far.view_as(x))


def arms(
    original: nn.Module, parts: Split, seed: int
) -> tuple[dict[str, Callable[..., nn.Module]], Adversarial]:
    """What runs on a copy of the original, by name, given a rate; and the examples of AMUN."""
    batch, generator = TRAINING["batch"], torch.Generator().manual_seed(seed)
    forget, retain = shuffled(parts.forget, FORGOTTEN), shuffled(parts.retain, batch)
    # in their order: noise goes by it
    adversarial = methods.adversarial_examples(original, [parts.forget.tensors])
    noise = noisy(parts, adversarial, generator)
    x, y = parts.forget.tensors
    relabelled = TensorDataset(x, methods.wrong_labels(y, CLASSES, generator))
    mixed = shuffled(ConcatDataset([parts.retain, relabelled]), batch)
    sets = {"forget": forget, "retain": retain}
    by_noise = partial(methods.amun, **sets, adversarial=noise)
    return {
        "FT": partial(methods.finetune, retain=retain),
        "RL": partial(methods.random_label, mixed=mixed),
        "AMUN": partial(methods.amun, **sets, adversarial=adversarial),
        "noise": by_noise,
        "noise, own rate": by_noise,
    }, adversarial


def repeat(images: Tensor, labels: Tensor, seed: int) -> tuple[dict[str, Measured], float]:
    """Every arm on one draw, and how far an adversarial example is."""
    parts = split(images, labels, SIZE, FORGOTTEN, seed)
    make = partial(network, images.shape[1:])
    original = trained(make, parts.train, seed=seed, **TRAINING)
    found = {"before": measured(original, parts)}
    for number in (1, 2):
        again = trained(make, parts.retain, seed=seed + number, **TRAINING)
        found[f"retrained {number}"] = measured(again, parts)
    runs, adversarial = arms(original, parts, seed)
    for name, run in runs.items():
        torch.manual_seed(seed)
        model = run(copy.deepcopy(original), epochs=EPOCHS, lr=RATES[name])
        found[name] = measured(model, parts)
    return found, float(adversarial.distances.mean())


def run(seed: int, data: Path | None) -> dict[str, Any]:
    """One seed: its draws of what is learnt and forgotten, weights and batches."""
    start = time.process_time()
    images, labels = load(data)
    each, distances = [], []
    for number in range(REPEATS):
        found, distance = repeat(images, labels, 10_000 * (seed + 1) + 10 * number)
        each.append(found)
        distances.append(distance)
    rows = {name: mean([found[name] for found in each]) for name in each[0]}
    both = [rows.pop("retrained 1"), rows.pop("retrained 2")]
    retrained = mean(both)
    gaps = {name: gap(row, retrained) for name, row in rows.items()}
    for name, row in (rows | {"retrained": retrained}).items():
        print(f"{name:>16}", {k: round(v, 3) for k, v in row.items()}, round(gaps.get(name, 0), 4))
    facts = {
        "data": "digits" if data is None else data.name,
        "rows": rows | {"retrained": retrained},
        "gaps": gaps,
        "gap of two retrained": gap(*both),
        "distance": sum(distances) / len(distances),
        "repeats": each,
    }
    claims, controls = judged(rows, retrained, gaps)
    return record(seed, claims, controls, facts, time.process_time() - start)


def judged(
    rows: dict[str, Measured], retrained: Measured, gaps: dict[str, float]
) -> tuple[list[Claim], list[Claim]]:
    """Claims and controls from what was measured."""
    away = {name: abs(row["AUC"] - retrained["AUC"]) for name, row in rows.items()}
    others = min(gaps["FT"], gaps["RL"])
    claims = [
        at_most("AMUN: membership AUC from Retrain's", away["AMUN"], NEAR),
        at_most("AMUN: gap, by the smaller of FT's and RL's", gaps["AMUN"] / others, 1.0),
    ]
    controls = [
        Claim(
            f"{name}: membership AUC from Retrain's", away[name], f"> {NEAR:g}", away[name] > NEAR
        )
        for name in ("before", "noise")
    ]
    controls.append(at_least("noise: gap, by AMUN's", gaps["noise"] / gaps["AMUN"], WORSE))
    return claims, controls


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, OUT).parse_args(arguments)
    found = write(chosen.out, run(chosen.seed, chosen.data), TITLE)
    draw(found, chosen.out / "gaps.png")


if __name__ == "__main__":
    main()
