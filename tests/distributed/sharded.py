"""A small net whole and sharded side by side, and comparisons of what optimizers make of them."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sfron_fast import SaliencyMask, SFRonAdamW, SFRonSGD

KINDS = (SFRonSGD, SFRonAdamW)
EVERYTHING = {  # every kind of state
    SFRonSGD: {
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "moments": "separate",
        "slow_lr": 0.5,
    },
    SFRonAdamW: {"lr": 0.1, "amsgrad": True, "moments": "separate", "slow_lr": 0.5},
}


def net(dtype=torch.float32, seed=0):
    """Rows 7, 9, 1: shards of 2 to 4 ranks are even, uneven and empty, and begin inside a mask's
    bytes.
    """
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 1)]
    return nn.Sequential(*layers).to(dtype)


def shard(model, **options):
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def mask_of(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return SaliencyMask.from_bool(
        {n: torch.rand(p.shape, generator=generator) < 0.5 for n, p in model.named_parameters()}
    )


def placed(tensor, like):
    """A copy of a whole tensor, as a DTensor placed as ``like`` if that is one."""
    if not isinstance(like, DTensor):
        return tensor.clone()
    split = distribute_tensor(tensor.clone(), like.device_mesh, like.placements, src_data_rank=None)
    local = split.to_local().to(like.device)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )


def whole(tensor):
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def step_both(models, optimizers, step, retain_steps, seed=0, without=()):
    """One step of each optimizer with the same random gradients."""
    generator = torch.Generator().manual_seed(100 * seed + step)
    params = [dict(m.named_parameters()) for m in models]
    for name, like in params[0].items():
        grad = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)
        for mine in params:
            mine[name].grad = None if name in without else placed(grad, mine[name])
    for optimizer in optimizers:
        (optimizer.step if step % (retain_steps + 1) else optimizer.forget_step)()


def assert_state_is_placed(model, optimizer):
    """Every state tensor is placed as its parameter, or a plain scalar."""
    kinds = {
        k: v for group in optimizer.param_groups for k, v in optimizer.known_kinds(group).items()
    }
    for name, param in model.named_parameters():
        for key, value in optimizer.state[param].items():
            if kinds[key].role == "count":
                assert not isinstance(value, DTensor), (name, key)
                assert value.shape == (), (name, key)
            else:
                assert isinstance(value, DTensor), (name, key)
                assert (value.shape, value.placements, value.device_mesh, value.device) == (
                    param.shape,
                    param.placements,
                    param.device_mesh,
                    param.device,
                ), (name, key)


def assert_equal(models, optimizers, bound=None):
    """Parameters and states of the sharded are those of the whole, in all bits or within
    ``bound(name, value)``.
    """
    theirs, ours = (dict(m.named_parameters()) for m in models)
    for name, param in theirs.items():
        pairs = {"": (param, ours[name])}
        expected, found = optimizers[0].state[param], optimizers[1].state[ours[name]]
        assert expected.keys() == found.keys(), name
        pairs |= {key: (expected[key], found[key]) for key in expected}
        for key, (want, have) in pairs.items():
            want, have = whole(want), whole(have).to(want.device)
            assert want.dtype == have.dtype, (name, key)
            if bound is None:
                assert torch.equal(want, have), (name, key, (want - have).abs().max())
            else:
                worst = ((want - have).abs() / bound(key, want)).max().item()
                assert worst <= 1.0, (name, key, worst)
