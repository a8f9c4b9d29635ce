"""What each client does: FedAvg with a backdoor and without; and what the client that has it does
by itself.
"""

import copy
from time import process_time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sfron_fast import methods
from sfron_fast.methods.ferrari import perturbations, sensitivity

from ..processes import Clock, average

TARGET = 0  # the class that the trigger leads to
ATTACKER = 0  # rank
LOCAL_EPOCHS, RATE, BATCH = 4, 0.05, 32  # of FedAvg
LR, RETAIN_WEIGHT = 3e-3, 10.0  # of Ferrari; chosen on seed 7, as its epochs
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)  # of the released variant, which wants smaller ones

Data = tuple[Tensor, Tensor]  # images [samples, 1, side, side] and labels [samples]


class Federation(NamedTuple):
    """Each client's clean data, by rank; what the attacker adds; what is tested on."""

    clean: list[Data]
    triggered: Data  # labels are TARGET
    tested: Data
    rounds: int = 20
    more: int = 5  # rounds of fine-tuning by all
    epochs: int = 10  # of Ferrari


def feature(side: int) -> Tensor:
    """Where the trigger is, bool [1, side, side]: a square in a corner."""
    where = torch.zeros(1, side, side, dtype=torch.bool)
    where[:, : side // 4, : side // 4] = True
    return where


def stamped(images: Tensor) -> Tensor:
    """With the trigger, white."""
    return images.masked_fill(feature(images.shape[-1]), 1.0)


def network(side: int, seed: int) -> nn.Module:
    """Two convolutions and two linear layers."""
    torch.manual_seed(seed)
    inside = 32 * (side // 4) ** 2
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(inside, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def loader(data: Data, seed: int) -> DataLoader[Any]:
    """Shuffled by ``seed``."""
    order = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(*data), BATCH, shuffle=True, generator=order)


def federated(model: nn.Module, mine: Data, rounds: int, seed: int) -> Clock:
    """FedAvg in place, each client weighted by its samples."""
    clock, batches = Clock(), loader(mine, 100 * seed + dist.get_rank())
    samples = torch.tensor(float(len(mine[1])))
    dist.all_reduce(samples)
    share = len(mine[1]) / float(samples)
    for _ in range(rounds):
        with clock.charged("local"):
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
            for _ in range(LOCAL_EPOCHS):
                for images, labels in batches:
                    optimizer.zero_grad()
                    F.cross_entropy(model(images), labels).backward()
                    optimizer.step()
        with clock.charged("averaging"):
            average(model, share)
    return clock


@torch.no_grad()
def judged(model: nn.Module, tested: Data, seed: int) -> dict[str, Any]:
    """Of images that training has not seen; the trigger is on all but those of its class."""
    images, labels = tested
    others = labels != TARGET
    triggered = stamped(images[others])
    said, led = model(images).argmax(1), model(triggered).argmax(1)
    noise = perturbations(
        triggered,
        feature(images.shape[-1]),
        20,
        (0.05, 1.0),
        torch.Generator().manual_seed(seed),
    )
    return {
        "backdoor success": (led == TARGET).float().mean().item(),
        "true label": (led == labels[others]).float().mean().item(),
        "clean": (said == labels).float().mean().item(),
        "recall": [(said[labels == c] == c).float().mean().item() for c in range(10)],
        "sensitivity": sensitivity(model, triggered, noise).mean().item(),
    }


def client(federation: Federation, seed: int) -> dict[str, Any]:
    """All this client does; run in every client's process. The attacker judges."""
    begun, rank = process_time(), dist.get_rank()
    clean = federation.clean[rank]
    mine = clean
    if rank == ATTACKER:
        mine = tuple(map(torch.cat, zip(clean, federation.triggered, strict=True)))
    side = clean[0].shape[-1]
    model, retrained = network(side, seed), network(side, seed)
    federated(model, mine, federation.rounds, seed)
    found: dict[str, Any] = {
        "retrained": federated(retrained, clean, federation.rounds, seed).seconds
    }
    tuned = copy.deepcopy(model)
    federated(tuned, clean, federation.more, seed + 1)
    if rank == ATTACKER:
        models = {"before": model, "retrained": retrained, "fine-tuned by all": tuned}
        found["rows"] = {
            name: judged(each, federation.tested, seed) for name, each in models.items()
        } | alone(model, federation, seed)
    found["seconds"] = process_time() - begun
    return found


def alone(model: nn.Module, federation: Federation, seed: int) -> dict[str, Any]:
    """Ferrari, and what must fail, by the attacker with its own data."""
    clean, triggered = federation.clean[ATTACKER], federation.triggered
    where = feature(clean[0].shape[-1])
    rows = {}

    def arm(name: str, retain: bool, lr: float = LR, through: bool = True) -> None:
        after, clock = copy.deepcopy(model), Clock()
        with clock.charged(name):
            methods.ferrari(
                after,
                forget=loader(triggered, seed),
                feature=where,
                retain=loader(clean, seed + 1) if retain else None,
                retain_weight=RETAIN_WEIGHT,
                through_perturbed=through,
                seed=seed,
                epochs=federation.epochs,
                lr=lr,
            )
        rows[name] = judged(after, federation.tested, seed) | {"seconds": clock.seconds[name]}

    arm("Ferrari", retain=True)
    arm("without CE", retain=False)
    for lr in RATES:
        arm(f"released, lr {lr:g}", retain=False, lr=lr, through=False)
        arm(f"released and CE, lr {lr:g}", retain=True, lr=lr, through=False)
    after = copy.deepcopy(model)
    methods.finetune(after, loader(clean, seed + 1), epochs=federation.epochs, lr=LR, cosine=False)
    rows["CE alone"] = judged(after, federation.tested, seed)
    return rows
