"""What goes wrong on one rank ends on all of them, or nowhere; nobody waits for ever."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks, outcomes
from sharded import EVERYTHING, KINDS, assert_equal, mask_of, net, shard, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import sfron_fast as sf

# cycles of three: saved, and killed, between the forget step and the last retain step
STEPS, SAVED, KILLED = 9, 5, 7


def training(kind):
    model = net()
    saliency = mask_of(model)
    optimizer = kind(
        shard(model).named_parameters(),
        saliency=saliency,
        retain_steps=2,
        max_norm=1.0,
        **EVERYTHING[kind],
    )
    generator = torch.Generator().manual_seed(1)
    forget, retain = (TensorDataset(torch.randn(n, 5, generator=generator)) for n in (7, 40))
    return (
        model,
        optimizer,
        sf.PairedLoader(forget=forget, retain=retain, batch_size=6, retain_steps=2),
    )


def train(parts, steps, folder=None, kill=None):
    """Up to step ``steps``, with a checkpoint at ``SAVED``; rank 1 dies in the forward of step
    ``kill``.
    """
    model, optimizer, loader = parts
    while True:
        for phase, (inputs,) in loader:
            if loader.position == kill and dist.get_rank() == 1:
                model[2].register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            (loss if optimizer.mid_cycle else -loss).backward()
            assert optimizer.mid_cycle == (phase == "retain")
            (optimizer.step if optimizer.mid_cycle else optimizer.forget_step)()
            if folder is not None and loader.position == SAVED:
                weights, states = get_state_dict(model, optimizer)
                dcp.save(
                    {"model": weights, "optimizer": states, "loader": loader.state_dict()},
                    checkpoint_id=folder,
                )
            if loader.position == steps:
                return parts


def killed(folder):
    train(training(KINDS[0]), STEPS, folder, KILLED)


def resumed(folder):
    model, optimizer, loader = training(KINDS[0])
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states, "loader": loader.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    loader.load_state_dict(state["loader"])
    assert loader.position == SAVED
    assert optimizer.mid_cycle
    ours, theirs = train((model, optimizer, loader), STEPS), train(training(KINDS[0]), STEPS)
    assert_equal((theirs[0], ours[0]), (theirs[1], ours[1]))


@pytest.mark.checklist("C5")
def test_a_rank_killed_in_a_step_ends_the_job_and_the_checkpoint_resumes(tmp_path):
    folder = tmp_path / "checkpoint"
    ends = outcomes(2, killed, folder)
    assert ends[1].exitcode == -signal.SIGKILL
    assert ends[0].exitcode == 1, "rank 0 waited for a dead rank"
    assert "Error" in ends[0].error
    on_ranks(2, resumed, folder)


class Lacking(nn.Module):
    """A layer that no data reach, and one that only ranks with samples do, where torch allows that
    (DDP).
    """

    def __init__(self, everywhere):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.some, self.never = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.everywhere = everywhere

    def forward(self, x):
        x = self.first(x)
        return x + self.some(x) if len(x) or self.everywhere else x


def lacking(kind, wrap, inputs, mine, group):
    model = Lacking(everywhere=wrap is fully_sharded)
    run = wrap(model)
    optimizer = kind(model.named_parameters(), lr=0.1, max_norm=100.0, slow_lr=0.5, retain_steps=1)
    before = [whole(p).clone() for p in model.never.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        values = run(mine).square().mean(1)
        (-(sf.adaptive_weights(values, group=group) * values).sum()).backward()
        optimizer.forget_step()
        optimizer.zero_grad()
        run(inputs).square().mean().backward()
        optimizer.step()
    assert all(
        torch.equal(a, whole(p)) for a, p in zip(before, model.never.parameters(), strict=True)
    )
    return [whole(p).clone() for p in model.parameters()]


def unused(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def fully_sharded(model):
    for layer in model.children():
        fully_shard(layer)
    return fully_shard(model)


def without_samples_or_gradients():
    """Rank 1 has nothing to forget: what one process makes of all samples, to the bit, as halves of
    doubles are.
    """
    inputs = torch.arange(15.0).reshape(3, 5) / 15
    for kind in KINDS:
        expected = lacking(kind, lambda model: model, inputs, inputs, None)
        for wrap in (unused, fully_sharded):
            mine = inputs if dist.get_rank() == 0 else inputs[:0]
            found = lacking(kind, wrap, inputs, mine, dist.group.WORLD)
            assert all(map(torch.equal, expected, found)), (kind, wrap)


def fisher_behind_an_evaluation():
    """Without a backward FSDP2 leaves the root gathered: its parameters look like plain ones."""
    fishers = []
    for evaluated in (False, True):
        model = net()
        fully_shard(model[0])
        fully_shard(model)
        if evaluated:
            with torch.no_grad():
                model(torch.ones(2, 5))
        batches = [(torch.full((2, 5), float(dist.get_rank())), torch.ones(2, 1))]
        fishers.append(
            sf.estimate_fisher(model, batches, nn.functional.mse_loss, group=dist.group.WORLD)
        )
    assert fishers[0].keys() == fishers[1].keys()
    for name, value in fishers[0].items():
        assert torch.equal(whole(value), whole(fishers[1][name])), name


class Sometimes(Lacking):
    """Its second layer only on the first rank; the root's, so that all ranks gather it."""

    def forward(self, x):
        x = self.first(x)
        return x + self.some(x) if dist.get_rank() == 0 else x


def reached_on_one_rank():
    ended = []
    for wrap in (unused, fully_shard):
        model = Sometimes(everywhere=True)
        run = wrap(model)
        if wrap is fully_shard:
            model.set_reduce_scatter_unused_params(True)
        optimizer = KINDS[0](model.named_parameters(), lr=0.125, max_norm=100.0)
        before = whole(model.some.weight).clone()
        for step in (optimizer.forget_step, optimizer.step):
            optimizer.zero_grad()
            run(torch.ones(2, 5)).sum().backward()
            step()
        assert not torch.equal(before, whole(model.some.weight))
        ended.append([whole(p).clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*ended, strict=True))


def lacks():
    without_samples_or_gradients()
    if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):  # torch 2.13 has it
        reached_on_one_rank()
    fisher_behind_an_evaluation()


@pytest.mark.checklist("F1", "F3")
def test_what_one_rank_lacks_keeps_nobody_waiting():
    on_ranks(2, lacks)
