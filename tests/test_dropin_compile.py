"""torch.compile of the steps, and no autotuning of what writes its input."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sfron_fast as sf

BOTH = pytest.mark.parametrize("kind", [sf.SFRonSGD, sf.SFRonAdamW])

PACKAGE = Path(sf.__file__).parent


def trainee(kind, lr):
    torch.manual_seed(0)
    params = [(f"p{i}", nn.Parameter(torch.randn(s))) for i, s in enumerate([(4, 3), (7,)])]
    for _, p in params:
        p.grad = torch.randn_like(p)
    saliency = sf.SaliencyMask.from_bool({n: torch.rand_like(p) < 0.5 for n, p in params})
    extra = {"momentum": 0.9} if kind is sf.SFRonSGD else {}
    return params, kind(params, lr=lr, saliency=saliency, max_norm=0.5, weight_decay=0.01, **extra)


def course(kind, compile_step, steps, tensor_lr):
    """A schedule over retain steps after one forget step; (weights, compilations)."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    params, optimizer = trainee(kind, torch.tensor(0.1) if tensor_lr else 0.1)
    optimizer.init_state()
    optimizer.forget_step()
    step = torch.compile(optimizer.step, backend=backend) if compile_step else optimizer.step
    for i in range(steps):
        lr = 0.1 * 0.98**i
        if tensor_lr:
            optimizer.param_groups[0]["lr"].fill_(lr)
        else:
            optimizer.param_groups[0]["lr"] = lr
        step()
    return [p.detach() for _, p in params], len(graphs)


@pytest.mark.checklist("E1")
@BOTH
def test_compiled_step_is_the_eager_one_and_compiled_at_most_twice(kind):
    """lr is a tensor that a schedule changes at each of 100 steps."""
    eager, _ = course(kind, False, 100, True)
    compiled, graphs = course(kind, True, 100, True)
    assert all(map(torch.equal, eager, compiled))
    assert 1 <= graphs <= 2


@pytest.mark.checklist("E5")
def test_nothing_is_autotuned():
    """An autotuner runs a kernel several times; most of ours write their input."""
    for path in PACKAGE.rglob("*.py"):
        assert not re.search(r"\bautotune\b", path.read_text()), path
