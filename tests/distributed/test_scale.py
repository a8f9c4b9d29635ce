"""The scale model's formulas give exactly what small runs hold and send."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharded import mask_of
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.tools import scale, scale_formulas
from sfron_fast import SFRonAdamW

KINDS = {
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}
LAYERS, STEPS = 3, 2


class Sent(TorchDispatchMode):
    """Bytes that this rank sends through rings, by collective."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = KINDS[func._schema.name.removeprefix("c10d::")]  # an unknown one is an error
            message = (
                args[0][0] if name == "all-reduce" else args[0] if name == "all-gather" else args[1]
            )
            times = 2 if name == "all-reduce" else 1
            ranks = dist.get_world_size()
            self.bytes[name] += (
                times * message.numel() * message.element_size() * (ranks - 1) / ranks
            )
        return func(*args, **(kwargs or {}))


def small(width):
    """The scale model and the module: layers of their own, an embedding and a head that are the
    rest.
    """
    model = nn.Sequential(
        nn.Embedding(20, width),
        *[nn.Linear(width, width) for _ in range(LAYERS)],
        nn.Linear(width, 20, bias=False),
    )
    layer = [(width, width), (width,)]
    rest = [(20, width), (20, width)]
    return scale_formulas.Model("small", layer, LAYERS, rest, width, 20), model


def one_cycle(width):
    """What a cycle sends, and what it holds at the end of its forget step's backward."""
    _, model = small(width)
    saliency = mask_of(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in list(model)[1:-1]:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = SFRonAdamW(
        model.named_parameters(),
        lr=1e-3,
        saliency=saliency,
        max_norm=1.0,
        retain_steps=STEPS,
        slow_lr=0.5,
    )
    ids = torch.arange(8) + dist.get_rank()
    optimizer.init_state()
    with Sent() as seen:
        for i in range(1 + STEPS):
            optimizer.zero_grad()
            model(ids).float().square().mean().backward()
            if i:
                optimizer.step()
                continue
            kinds = {"gradients": [p.grad for p in model.parameters()]}
            optimizer.forget_step()
    states = [optimizer.state[p] for p in model.parameters()]
    kinds["weights and moments"] = [
        *model.parameters(),
        *(s[k] for s in states for k in ("exp_avg", "exp_avg_sq")),
    ]
    kinds["slow weights"] = [s["slow"] for s in states]
    held = {
        kind: sum(t.to_local().numel() * t.to_local().element_size() for t in tensors)
        for kind, tensors in kinds.items()
    }
    assert all(isinstance(t, DTensor) for tensors in kinds.values() for t in tensors)
    return dict(seen.bytes), held


# even and uneven shards of the layers for three ranks; those of the rest are uneven
WIDTHS = (9, 7)


def cycles():
    return [one_cycle(width) for width in WIDTHS]


def test_bytes_sent_and_held_are_those_of_the_formulas():
    ranks = on_ranks(3, cycles)
    for i, width in enumerate(WIDTHS):
        paper, _ = small(width)
        parts = scale_formulas.sent(paper, 3, STEPS)
        expected = {
            "all-gather": parts["all-gather, forward"] + parts["all-gather, backward"],
            "reduce-scatter": parts["reduce-scatter"],
            "all-reduce": parts["all-reduce of the norm"],
        }
        assert all(cycle[i][0] == pytest.approx(expected, rel=1e-12) for cycle in ranks)
        kept = scale_formulas.held(paper, 3)
        for kind, largest in ranks[0][i][1].items():  # torch gives the first rank the largest shard
            assert largest == kept[kind] > ranks[-1][i][1][kind]


def test_weights_are_those_of_the_names():
    named = {"1B": 1e9, "8B": 8e9, "70B": 70e9, "405B": 405e9, "1T": 1e12}
    for model in scale_formulas.llamas():
        assert model.weights == pytest.approx(
            named[model.name], rel=0.03 if model.name != "1B" else 0.25
        )


def test_the_committed_report_is_the_generated_one():
    assert (scale.RESULTS / "scale.md").read_text() == scale.tables()
