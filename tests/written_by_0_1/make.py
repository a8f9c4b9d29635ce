"""Writes the files in this folder: what users of version 0.1.0 may have on their disks.

Run with the code of that time (commit 628481e), where ``unlearn`` takes its loaders in the order
retain, forget. A later version must read the files, and must not be used to write them anew.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sfron_fast as sf

HERE = Path(__file__).parent
CYCLES, RETAIN_STEPS = 3, 2
STEPS, SAVED_AFTER = 9, 4  # one retain step of the second cycle is still to come, and one cycle
FORGETS = {"forget_lr": 0.2, "max_norm": 0.5, "slow_lr": 0.5, "retain_steps": RETAIN_STEPS}
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "moments": "separate", **FORGETS}
ADAMW = {"lr": 0.01, "amsgrad": True, "moments": "separate", **FORGETS}
OPTIMIZERS = {
    "sgd": (sf.SFRonSGD, SGD),
    "adamw": (sf.SFRonAdamW, ADAMW),
    "adamw_bfloat16": (sf.SFRonAdamW, {**ADAMW, "state_dtype": torch.bfloat16}),
}
RECIPE = sf.Recipe.official(
    cycles=CYCLES,
    retain_steps=RETAIN_STEPS,
    lr=0.01,
    optimizer="adamw",
    moments="separate",
    slow_lr=0.5,
)


class Stop(Exception):
    """What ends a run half way."""


def stop(cycle, model):
    """Stops a run after its second cycle, which is after the checkpoint at step 4."""
    if cycle == 2:
        raise Stop


def network(weights=None):
    """A model of two layers, with the given weights."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if weights is not None:
        model.load_state_dict(weights)
    return model


def loaders(samples):
    """Retain and forget batches, in an order that comes from a generator of each loader."""
    found = []
    for seed, name in enumerate(("retain", "forget")):
        generator = torch.Generator().manual_seed(seed)
        dataset = TensorDataset(*samples[name])
        found.append(DataLoader(dataset, 4, shuffle=True, generator=generator))
    return found


def probe(model, samples):
    """Outputs and gradients, whose last bits depend on the machine and on torch."""
    loss = nn.functional.cross_entropy(model(samples["retain"][0]), samples["retain"][1])
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def advance(optimizer, model, gradients, begin, end):
    """Some steps of cycles, on gradients that were written down."""
    for i in range(begin, end):
        for parameter, gradient in zip(model.parameters(), gradients[i], strict=True):
            parameter.grad = gradient.clone()
        if i % (1 + RETAIN_STEPS) == 0:
            optimizer.forget_step()
        else:
            optimizer.step()


def main():
    """Write all of it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    torch.set_num_threads(1)
    model = network()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    shapes = [p.shape for p in model.parameters()]
    gradients = [[torch.randn(shape) for shape in shapes] for _ in range(STEPS)]
    samples = {
        "retain": (torch.randn(12, 4), torch.randint(3, (12,))),
        "forget": (torch.randn(8, 4), torch.randint(3, (8,))),
    }
    mask = sf.SaliencyMask.from_bool({n: torch.rand(p.shape) < 0.6 for n, p in start.items()})
    mask.save(HERE / "mask.safetensors")
    chosen = {name: mask.to_bool(name).clone() for name in start}
    results = {}
    for name, (kind, settings) in OPTIMIZERS.items():
        model = network(start)
        optimizer = kind(model.named_parameters(), saliency=mask, **settings)
        advance(optimizer, model, gradients, 0, SAVED_AFTER)
        assert optimizer.mid_cycle
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(saved, HERE / f"{name}.pt")
        advance(optimizer, model, gradients, SAVED_AFTER, STEPS)
        results[name] = {n: p.detach().clone() for n, p in model.state_dict().items()}
    settings = {"recipe": RECIPE, "checkpoint": HERE / "run", "checkpoint_every": SAVED_AFTER}
    try:
        sf.unlearn(network(start), *loaders(samples), on_cycle=stop, **settings)
    except Stop:
        files = {path: path.read_bytes() for path in (HERE / "run").iterdir()}
    model = network(start)
    sf.unlearn(model, *loaders(samples), **settings)
    results["run"] = {n: p.detach().clone() for n, p in model.state_dict().items()}
    for path, content in files.items():
        path.write_bytes(content)
    torch.save(
        {
            "start": start,
            "gradients": gradients,
            "samples": samples,
            "mask": chosen,
            "probe": probe(network(start), samples),
            "results": results,
        },
        HERE / "expected.pt",
    )


if __name__ == "__main__":
    main()
