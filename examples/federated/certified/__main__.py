"""Certified unlearning in decentralised federated learning, with what the certificate costs.

    python -m examples.federated.certified [--seed N] [--out DIR] [--data FILE]

Ten clients, a process each, train softmax regression by gossip over a ring and over a random graph.
One of them takes back a fifth of its samples; or it leaves. All clients share a Newton step, whose
sums go along the graph's edges too, and is compared with retraining on what remains. A third
setting gives each client its own digits; it has no part in the verdict.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import networkx
import torch
from torch import Tensor

from examples.systems.claims import Claim, at_most, record, write
from examples.systems.images import options
from sfron_fast.methods.gaussian_noise import gaussian_sigma

from ..data import load, split
from ..processes import connected, strangers
from ..processes import run as run_clients
from .clients import DECAY, LEAVER, REQUESTS, Data, Setting, client, remaining
from .figure import draw

OUT = Path("benchmarks/results/systems/certified")
TITLE = "Certified unlearning in decentralised federated learning"
CLIENTS, EDGES = 10, 0.4  # chance of an edge in the random graph
LEAST, MOST = 0.5, 1.5  # a client's samples, by their mean: the leaver has fewest
NOISES = 200  # draws that an accuracy after noise is a mean of
RATIO, LOST, TIME = 0.05, 0.03, 0.05
BY_LABEL = "ring, by label"
CONTROLS = ("diagonal Fisher", "sample weights")
TOLD = ("ratio", "certified sigma", "measured sigma", "sigmas' ratio", "accuracy certified", "time")


def settings(images: Tensor, labels: Tensor, seed: int) -> dict[str, Setting]:
    """By name."""
    share = torch.linspace(LEAST, MOST, CLIENTS)
    sizes = (share / share.sum() * len(labels)).floor().long().tolist()

    def parts(order: Tensor) -> list[Data]:
        return [(images[part], labels[part]) for part in order[: sum(sizes)].split(sizes)]

    alike, apart = parts(torch.arange(len(labels))), parts(labels.argsort(stable=True))
    ring = networkx.cycle_graph(CLIENTS)
    drawn = connected(partial(networkx.gnp_random_graph, CLIENTS, EDGES), seed, LEAVER)
    return {
        "ring": Setting(ring, alike),
        "Erdos-Renyi": Setting(drawn, alike),
        BY_LABEL: Setting(ring, apart),
    }


def run(seed: int, data: Path | None) -> dict[str, Any]:
    """One seed: the split, the random graph, the noise that accuracies are taken after."""
    begun = process_time()
    images, labels = load(data)
    images = images.flatten(1).double()
    trained, tested = split(len(labels), seed)
    given = settings(images[trained], labels[trained], seed)
    found = run_clients(CLIENTS, client, given)

    def accuracy(weights: Tensor) -> float:
        matrix, bias = weights[:-10].view(10, -1), weights[-10:]
        said = (images[tested] @ matrix.T + bias).argmax(1)
        return (said == labels[tested]).double().mean().item()

    generator = torch.Generator().manual_seed(seed)
    cases, messages = {}, {}
    for name, setting in given.items():
        mine = [each[name] for each in found]
        messages[name] = counted(mine, setting)
        for request in REQUESTS:
            case = compared(mine, request, setting.tolerance, accuracy, generator)
            cases[f"{name}, {request}"] = case
            told = ", ".join(f"{key} {case[key]:.3g}" for key in TOLD)
            print(f"{name}, {request}: {told}", flush=True)
    facts = {
        "data": "scikit-learn's digits" if data is None else data.name,
        "cases": cases,
        "messages": messages,
    }
    spent = process_time() - begun + sum(each["seconds"] for each in found)
    return record(seed, *judged(facts), facts, spent)


def counted(mine: Sequence[dict[str, Any]], setting: Setting) -> dict[str, Any]:
    """Messages by pair of neighbours, both ways and all phases; and those of no neighbours."""
    pairs: dict[str, int] = {}
    outside = 0
    for number, request in enumerate((None, *REQUESTS)):
        graph = setting.graph if request is None else remaining(setting, request).graph
        sent = {rank: each["sent"][number] for rank, each in enumerate(mine) if rank in graph}
        outside += strangers(sent, graph)
        for rank, counts in sent.items():
            for peer, count in counts.items():
                pair = f"{min(rank, peer)}-{max(rank, peer)}"
                pairs[pair] = pairs.get(pair, 0) + count
    return {"neighbours": dict(sorted(pairs.items())), "others": outside}


def compared(
    mine: Sequence[dict[str, Any]],
    request: str,
    tolerance: float,
    accuracy: Callable[[Tensor], float],
    generator: torch.Generator,
) -> dict[str, Any]:
    """The step beside retraining, of one setting and request."""
    here = [each[request] for each in mine if request in each]
    one, original = here[0], mine[0]["original"]
    retrained, certificate = one["retrained"], one["certificate"]
    distance = {name: float((one[name] - retrained.weights).norm()) for name in ("step", *CONTROLS)}
    before = float((original.weights - retrained.weights).norm())
    asked = certificate.epsilon, certificate.delta
    measured = gaussian_sigma(distance["step"], *asked)
    of_two = gaussian_sigma(one["bound of two"], *asked)

    def noisy(sigma: float, weights: Tensor = one["step"]) -> float:
        found = []
        for _ in range(NOISES):
            noise = torch.randn(len(weights), generator=generator, dtype=torch.float64)
            found.append(accuracy(weights + sigma * noise))
        return sum(found) / NOISES

    def spent_on(name: str) -> float:
        return sum(each["clock"].seconds[name] for each in here)

    seconds = spent_on("certified")
    spent = sum(each["retrained"].clock.seconds.total() for each in here)
    # the gradient's norm after the step, and when retraining got there
    left = max(certificate.distance * DECAY - tolerance, tolerance)
    enough = next(n for n, look in enumerate(retrained.path) if look[1] <= left)
    soon = sum(each["retrained"].path[enough][2] for each in here)
    return {
        "before": before,
        "ratio": distance["step"] / before,
        **{name: distance[name] / before for name in CONTROLS},
        "distance": distance["step"],
        "certified distance": certificate.distance,
        "certified sigma": certificate.sigma,
        "measured sigma": measured,
        "sigmas' ratio": certificate.sigma / measured,
        "accuracy before": accuracy(original.weights),
        "accuracy retrained": accuracy(retrained.weights),
        "accuracy step": accuracy(one["step"]),
        "accuracy certified": noisy(certificate.sigma),
        "accuracy measured": noisy(measured),
        "two steps": {
            "certified sigma": of_two,
            "accuracy certified": noisy(of_two, one["two steps"]),
            "time": spent_on("two steps") / spent,
        },
        "seconds": seconds,
        "time": seconds / spent,
        "time to the same gradient": seconds / soon,
        "time from zero": seconds / spent_on("from zero"),
        "products from zero": one["products from zero"],
        "products": certificate.products,
        "messages": sum(each["messages"] for each in here),
        "rounds": retrained.rounds,
        "apart": max(each["retrained"].apart for each in here),
    }


def judged(facts: dict[str, Any]) -> tuple[list[Claim], list[Claim]]:
    """Claims and controls, each by the worst of the cases in which clients are alike."""
    cases = [case for name, case in facts["cases"].items() if not name.startswith(BY_LABEL)]

    def worst(value: Callable[[dict[str, Any]], float]) -> float:
        return max(map(value, cases))

    def lost(kind: str) -> float:
        return worst(lambda case: case["accuracy retrained"] - case[f"accuracy {kind}"])

    claims = [
        at_most("distance to retrained, after by before", worst(lambda c: c["ratio"]), RATIO),
        at_most(
            "that distance by its certified bound",
            worst(lambda c: c["distance"] / c["certified distance"]),
            1.0,
        ),
        at_most("accuracy lost by noise of the measured distance", lost("measured"), LOST),
        at_most("accuracy lost by noise of the certified bound", lost("certified"), LOST),
        at_most("CPU time by that of retraining", worst(lambda c: c["time"]), TIME),
        at_most(
            "messages between clients that are no neighbours",
            sum(each["others"] for each in facts["messages"].values()),
            0,
        ),
    ]
    controls = []
    for name in CONTROLS:
        least = min(case[name] for case in cases)
        text = f"{name}: distance, after by before, at best"
        controls.append(Claim(text, least, f"> {RATIO:g}", least > RATIO))
    return claims, controls


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, OUT).parse_args(arguments)
    found = write(chosen.out, run(chosen.seed, chosen.data), TITLE)
    draw(found, chosen.out / "certified.png")


if __name__ == "__main__":
    main()
