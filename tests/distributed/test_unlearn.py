"""unlearn() on several ranks: the run of one process on the same global batches."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import on_ranks
from sharded import whole
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sfron_fast as sf

CLASSES = 5
CUT = 3  # samples of a batch that are rank 0's; rank 1 has the others, perhaps none


def net(normed=False):
    torch.manual_seed(3)
    norm = [nn.BatchNorm1d(7)] if normed else []
    return nn.Sequential(nn.Linear(6, 7), *norm, nn.Tanh(), nn.Linear(7, CLASSES))


def batches(count, sizes, seed):
    """Batches whose sizes take turns; a share of rank 1 is odd, and sometimes empty."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(sizes[i % len(sizes)], 6, generator=generator),
            torch.randint(CLASSES, (sizes[i % len(sizes)],), generator=generator),
        )
        for i in range(count)
    ]


def mine(global_batches):
    """This rank's parts: a short last batch is all rank 0's, and rank 1's list ends before it."""
    rank = dist.get_rank()
    parts = [(x[:CUT], y[:CUT]) if rank == 0 else (x[CUT:], y[CUT:]) for x, y in global_batches]
    return parts[:-1] if rank and not len(parts[-1][1]) else parts


FORGET = batches(3, (7, 3, 2), 1)
RETAIN = batches(22, (8, 5, 3), 2)
HOLDOUT = batches(3, (6, 5, 3), 3)
SETS = {"forget": FORGET, "retain": RETAIN, "holdout": HOLDOUT}


def ours():
    return {name: mine(data) for name, data in SETS.items()}


class Absolute(sf.Task):
    """A loss of its own, which the kernels do not know."""

    def losses_of(self, outputs, batch):
        return (outputs - F.one_hot(batch[1], CLASSES)).abs().mean(1)

    def outputs(self, model, batch):
        return model(batch[0])

    def samples(self, batch):
        return len(batch[1])


def ddp(model):
    return DistributedDataParallel(model)


def fsdp(model, **options):
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def offloaded(model):
    return fsdp(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


PAPER = sf.Recipe.paper(cycles=4, retain_steps=3, lr=0.05, forget_lr=0.3)
OFFICIAL = sf.Recipe.official(
    cycles=4, retain_steps=3, lr=0.05, slow_lr=0.7, forget_weight=2.0, threshold=0.5
)
ADAM = PAPER.replace(optimizer="adamw", moments="separate", max_norm=0.5, forget_lr=0.02, lr=0.01)
RUNS = {
    "paper": {"recipe": PAPER, "eval_every": 2},
    "official": {"recipe": OFFICIAL, "eval_every": 2},
    "ceiling": {"recipe": PAPER.replace(ceiling=1.02, cycles=8, forget_lr=1.0)},
    "budget": {"recipe": ADAM, "retain_budget": 0.5},
    "task": {"recipe": PAPER, "task": Absolute()},
}


def run(model, data, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sf.unlearn(model, **data, **settings)


def weights(model):
    bare = getattr(model, "module", model)
    return {n: whole(t).clone() for n, t in bare.state_dict().items()}


def close(found, expected, scale=1.0):
    """Within some hundred roundings of fp32: sums over ranks have another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5 * scale, atol=2e-6 * scale)


def same_runs():
    for name, settings in RUNS.items():
        alone, start = net(), weights(net())
        expected = run(alone, SETS, **settings)
        assert any(not torch.equal(start[n], w) for n, w in weights(alone).items())
        for wrap in (ddp, fsdp, offloaded) if name == "paper" else (ddp, fsdp):
            model = wrap(net())
            found = run(model, ours(), **settings)
            close(weights(model), weights(alone))
            assert found.history == expected.history, (name, wrap)
            assert found.skipped_steps == expected.skipped_steps
            assert found.forgotten_steps == expected.forgotten_steps
            assert found.mask == expected.mask
            if name == "ceiling":
                assert expected.forgotten_steps > 0
            if name == "budget":
                assert found.budget_spent == pytest.approx(expected.budget_spent, rel=1e-3)


def zero(model):
    """DeepSpeed is not there: what it is known by."""
    engine = type("DeepSpeedEngine", (nn.Module,), {})()
    engine.module = model
    return engine


def marked(model):
    next(model.parameters()).ds_id = 0
    return model


def refused_wrappers():
    flat = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    for model in (flat, zero(net()), marked(net())):
        before = weights(model)
        with pytest.raises(ValueError, match=r"model: expected .* found .*fsdp_version: 2"):
            sf.unlearn(model, forget=FORGET, retain=RETAIN, recipe=PAPER)
        assert all(torch.equal(before[n], w) for n, w in weights(model).items())
    with pytest.raises(ValueError, match="group: expected None"):
        sf.unlearn(net(), forget=FORGET, retain=RETAIN, group=dist.group.WORLD)


def everything():
    refused_wrappers()
    same_runs()


def test_several_ranks_give_the_run_of_one_process():
    on_ranks(2, everything)
