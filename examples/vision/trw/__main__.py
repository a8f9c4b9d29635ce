"""TRW: a class is forgotten by learning what a model that never saw it would say.

    python -m examples.vision.trw [--seed N] [--out DIR] [--data FILE]

A perceptron learns scikit-learn's digits, or the images of an npz file (MNIST). Each of five
classes is then forgotten, by itself: by TRW, by plain rescaling of the model's own output, by
relabelling, and by a uniform target. Nine models are retrained without the class: eight references,
and one that is judged as the others are. No model names the class any more, so forget accuracy says
nothing: what counts is how far the mean output on its unseen images is from the references', and
whether the attack on the nearest class (MIA-NN) tells a model from them.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.diffusion.digits import CHOSEN, TESTED
from examples.systems.claims import Claim, at_least, at_most, record, write
from examples.systems.images import load, options
from sfron_fast.evaluation.nearest_class import NearestClassAttack
from sfron_fast.methods.trw import class_means, class_tilt

from .figure import draw as draw_figure
from .fixture import Data, accuracy_of, draw, mean_output, said, trained, variation
from .forgetting import MEANS, Forgetting

OUT = Path("benchmarks/results/systems/trw")
TITLE = "TRW: what a model that never saw the class would say, on "
REFERENCES, CHOICE = 8, 7  # retrained models; the seed that settings were chosen on
TRAIN, EPOCHS = {"digits": 1400, "npz": 2000}, {"digits": 30, "npz": 12}
AGAIN = "retrained again"
# of plain rescaling's excess: TRW's at most, the controls' at least; spreads of retrained models
HALF, WORSE, APART = 0.5, 2.0, 4.0


def run(seed: int, images: Data, epochs: int, name: str) -> dict[str, Any]:
    """One seed: which images are trained on, and all weights and batches."""
    start = time.process_time()
    original = trained(images.train, epochs, seed)
    classes = CHOSEN if seed == CHOICE else TESTED
    found = {str(label): forgotten(original, images, epochs, label, seed) for label in classes}
    averages = {way: mean([each["models"][way] for each in found.values()]) for way in
                found[str(classes[0])]["models"]}  # fmt: skip
    facts = {"images": name, "classes": found, "means": averages}
    facts["floor"] = sum(each["floor"] for each in found.values()) / len(found)
    claims, controls = judged(facts)
    return record(seed, claims, controls, facts, time.process_time() - start)


def forgotten(
    original: nn.Sequential, images: Data, epochs: int, label: int, seed: int
) -> dict[str, Any]:
    """One class: every model measured on test images, and the floor between two retrained ones."""
    retain = images.of(label, same=False)
    retrained = [
        trained(retain, epochs, 10000 * (seed + 1) + 100 * label + number)
        for number in range(REFERENCES + 1)
    ]
    references = [said(model, images.test) for model in retrained[:REFERENCES]]
    outputs = [mean_output(p, label) for p in references]
    pairs = [variation(*pair) for pair in combinations(outputs, 2)]
    attack = NearestClassAttack(references, forgotten=label)

    def measured(model: nn.Module) -> dict[str, float]:
        test, kept = said(model, images.test), said(model, retain)
        output = mean_output(test, label)
        return {
            "distance": sum(variation(output, other) for other in outputs) / len(outputs),
            "share": attack.share(test),
            "spreads": attack.distance(test),
            "forget accuracy": accuracy_of(test, label),
            "retain accuracy": accuracy_of(kept, label, same=False),
            "test accuracy": accuracy_of(test, label, same=False),
        }

    models = {"original": measured(original), AGAIN: measured(retrained[-1])}
    body = said(original[:-1], images.train)
    means, rows = class_means(body.logits, body.labels), original[-1].weight
    for way, unlearn in Forgetting(images, label, means, rows, seed).ways().items():
        model = copy.deepcopy(original)
        torch.manual_seed(seed)
        unlearn(model)
        models[way] = measured(model)
    shares = attack.shares.tolist()
    print(label, {way: round(row["distance"], 3) for way, row in models.items()}, flush=True)
    return {
        "floor": sum(pairs) / len(pairs),
        "nearest": attack.nearest,
        "tilted to": int(class_tilt(means, label, **MEANS).argmax()),
        "shares": shares,
        "models": models,
    }


def mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def judged(facts: dict[str, Any]) -> tuple[list[Claim], list[Claim]]:
    """Claims and controls from what was measured."""

    def excess(way: str) -> float:
        return facts["means"][way]["distance"] - facts["floor"]

    def spreads(way: str) -> list[float]:
        return [each["models"][way]["spreads"] for each in facts["classes"].values()]

    plain = max(excess("rescaling"), 1e-9)  # with none there is nothing to halve
    ratio = {way: excess(way) / plain for way in facts["means"]}
    claims = [
        at_most("excess of TRW's distance by rescaling's", ratio["TRW"], HALF),
        at_least(
            "MIA-NN, relabelling: least spreads of a class", min(spreads("relabelling")), APART
        ),
        at_least(
            "MIA-NN, uniform: least spreads of a class", min(spreads("uniform target")), APART
        ),
        at_most("MIA-NN, retrained again: most spreads of a class", max(spreads(AGAIN)), APART),
    ]
    controls = [
        at_least(f"excess of {way}'s distance by rescaling's", ratio[way], WORSE)
        for way in ("relabelling", "uniform target")
    ]
    return claims, controls


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, OUT).parse_args(arguments)
    kind, name = ("npz", chosen.data.stem) if chosen.data else ("digits", "digits")
    images = draw(*load(chosen.data), TRAIN[kind], chosen.seed)
    folder = chosen.out / name
    found = write(folder, run(chosen.seed, images, EPOCHS[kind], name), TITLE + name)
    draw_figure(found, folder / "trw.png")


if __name__ == "__main__":
    main()
