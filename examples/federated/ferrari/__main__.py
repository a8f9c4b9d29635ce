"""Ferrari: one client takes back a feature, here the trigger of a backdoor that it has planted.

    python -m examples.federated.ferrari [--seed N] [--out DIR] [--data FILE]

Ten clients, a process each, train by FedAvg. One of them has added copies of its images with a
white square in a corner, all labelled 0. It unlearns the square by itself, with its own images.
"""

from collections.abc import Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch

from examples.systems.claims import Claim, at_least, at_most, record, write
from examples.systems.images import options

from ..data import load, split
from ..processes import run as run_clients
from .clients import ATTACKER, TARGET, Data, Federation, client, stamped
from .figure import draw

OUT = Path("benchmarks/results/systems/ferrari")
TITLE = "Ferrari: one client takes back a feature"
CLIENTS = 10
SUCCESS, TRUE_LABEL, FALL = 0.05, 0.85, 0.1
PLANTED, LOST = 0.9, 0.3  # what the fixture must have, and what must fail


def federation(images: torch.Tensor, labels: torch.Tensor, seed: int) -> Federation:
    """An equal part for each client; the attacker's own images a second time, with the trigger."""
    trained, tested = split(len(labels), seed)
    clean = [(images[part], labels[part]) for part in trained.chunk(CLIENTS)]
    own, its = clean[ATTACKER]
    triggered = stamped(own[its != TARGET])
    led = torch.full((len(triggered),), TARGET)
    test: Data = images[tested], labels[tested]
    return Federation(clean, (triggered, led), test)


def run(seed: int, data: Path | None) -> dict[str, Any]:
    """One seed: the split, the weights at the start, the order of batches, the noise."""
    begun = process_time()
    found = run_clients(CLIENTS, client, federation(*load(data), seed), seed)
    rows = found[ATTACKER]["rows"]
    seconds = [each["retrained"].total() for each in found]
    facts = {
        "data": "scikit-learn's digits" if data is None else data.name,
        "rows": rows,
        "retraining": {"all clients": sum(seconds), "busiest client": max(seconds)},
    }
    claims, controls = judged(facts)
    spent = process_time() - begun + sum(each["seconds"] for each in found)
    return record(seed, claims, controls, facts, spent)


def falls(rows: dict[str, Any], name: str) -> list[float]:
    """By class, what its recall lost."""
    pairs = zip(rows["before"]["recall"], rows[name]["recall"], strict=True)
    return [before - after for before, after in pairs]


def judged(facts: dict[str, Any]) -> tuple[list[Claim], list[Claim]]:
    """Claims and controls from what was measured."""
    rows, ours = facts["rows"], facts["rows"]["Ferrari"]
    released = max(row["true label"] for name, row in rows.items() if name.startswith("released"))
    claims = [
        at_most("backdoor success", ours["backdoor success"], SUCCESS),
        at_least("triggered images said to be what they are", ours["true label"], TRUE_LABEL),
        at_most("largest fall of a class's recall", max(falls(rows, "Ferrari")), FALL),
    ]
    for who, seconds in facts["retraining"].items():
        text = f"CPU time by that of retraining, {who}"
        claims.append(at_most(text, ours["seconds"] / seconds, 1.0))
    controls = [
        at_least("before: backdoor success", rows["before"]["backdoor success"], PLANTED),
        at_least("CE alone: backdoor success", rows["CE alone"]["backdoor success"], PLANTED),
        Claim(
            "as released, best of all rates: triggered images said to be what they are",
            released,
            f"< {TRUE_LABEL:g}",
            released < TRUE_LABEL,
        ),
        at_least(
            "without CE: fall of the target's recall", falls(rows, "without CE")[TARGET], LOST
        ),
    ]
    return claims, controls


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = options(__doc__, OUT).parse_args(arguments)
    found = write(chosen.out, run(chosen.seed, chosen.data), TITLE)
    draw(found, chosen.out / "ferrari.png")


if __name__ == "__main__":
    main()
