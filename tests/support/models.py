"""Tiny models, data and loaders; everything is seeded, nothing takes more than milliseconds."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sfron_fast import Fisher, SaliencyMask, SFRonAdamW, SFRonSGD

FEATURES, CLASSES = 6, 4
# tiny tensors: a second thread only waits, for ages if the machine is busy
torch.set_num_threads(1)


def build(kind: str = "plain", dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """ "plain", "bn" (BatchNorm) or "dropout" (BatchNorm and Dropout)."""
    torch.manual_seed(seed)
    middle = {
        "plain": [],
        "bn": [nn.BatchNorm1d(10)],
        "dropout": [nn.BatchNorm1d(10), nn.Dropout(0.3)],
    }[kind]
    model = nn.Sequential(nn.Linear(FEATURES, 10), *middle, nn.Tanh(), nn.Linear(10, CLASSES)).to(
        dtype
    )
    with torch.no_grad():
        for buffer in model.buffers():  # running statistics that are not the defaults
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, dtype=buffer.dtype))
    return model


def data(samples: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, FEATURES, dtype=torch.float64, generator=generator).to(dtype)
    return inputs, torch.randint(CLASSES, (samples,), generator=generator)


def loader(
    samples: int,
    batch: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader:
    return DataLoader(
        TensorDataset(*data(samples, dtype, seed)), batch, shuffle=shuffle, generator=generator
    )


def random_mask(model: nn.Module, seed: int = 2) -> SaliencyMask:
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters()
    }
    return SaliencyMask.from_bool(chosen)


def random_fishers(shapes: dict[str, tuple[int, ...]], seed: int = 3) -> tuple[Fisher, Fisher]:
    generator = torch.Generator().manual_seed(seed)
    forget, retain = (
        {n: torch.rand(s, generator=generator) for n, s in shapes.items()} for _ in range(2)
    )
    return Fisher(forget), Fisher(retain)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers."""
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def equal(a: Any, b: Any) -> bool:
    """Whether state dicts are: tensors by value and dtype."""
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bits in every tensor."""
    return a.keys() == b.keys() and all(
        torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a
    )


def forever(batches: DataLoader) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from batches


# --- parameters and gradients for optimizers ------------------------------------------------------

SHAPES = {"a": (3, 5), "b": (7,), "c": (), "d": (2, 0, 3), "e": (11, 3)}


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {
        n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
        for n, s in SHAPES.items()
    }
    return {n: nn.Parameter(t) for n, t in made.items()}


def gradients(steps, dtype=torch.float64, seed=1, without=()):
    """One name -> gradient per step; ``without`` holds (step, name) pairs that have none."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            n: (
                None
                if (i, n) in without
                else torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)
            )
            for n, s in SHAPES.items()
        }
        for i in range(steps)
    ]


def masks(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.rand(s, generator=generator) < 0.5 for n, s in SHAPES.items()}


def run(optimizer, params, grads, inner):
    """Cycles of one forget step and ``inner`` retain steps."""
    for i, step in enumerate(grads):
        for name, param in params.items():
            param.grad = None if step[name] is None else step[name].clone()
        (optimizer.step if i % (inner + 1) else optimizer.forget_step)()


def near(ours, theirs, steps):
    """2 ulp of the largest weight a step: torch may contract to FMA, the package never does."""
    for name, param in ours.items():
        if param.numel():
            bound = (
                2
                * steps
                * torch.finfo(param.dtype).eps
                * max(1.0, theirs[name].detach().abs().max().item())
            )
            assert (param.detach() - theirs[name].detach()).abs().max().item() <= bound, name


def values(params):
    return {n: p.detach().clone() for n, p in params.items()}


# settings with which an optimizer keeps every kind of state it knows
EVERYTHING = {
    SFRonSGD: {
        "momentum": 0.9,
        "weight_decay": 0.1,
        "moments": "separate",
        "slow_lr": 0.5,
        "retain_steps": 2,
    },
    SFRonAdamW: {"amsgrad": True, "moments": "separate", "slow_lr": 0.5, "retain_steps": 2},
}


def states(optimizer):
    """(position, key) -> a copy of the state tensor."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    return {
        (i, k): v.clone()
        for i, p in enumerate(params)
        for k, v in optimizer.state.get(p, {}).items()
    }
