"""Weights in two pieces and moments in 8 bits in shards of FSDP2: bits, checkpoints, refusals."""

import lanes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from sharded import KINDS, mask_of, shard, step_both, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from sfron_fast.optim.elsewhere import settle

SETTINGS = {
    "lr": 0.01,
    "weight_decay": 0.1,
    "moments": "separate",
    "slow_lr": 0.5,
    "retain_steps": 2,
}
COMPACT = {"weight_bits": 24, "state_dtype": torch.int8}


def net(seed=0):
    """Rows of 32, 320 and 7: codes in one group, in two, and none; 7, 9 and 1 of them."""
    torch.manual_seed(seed)
    layers = [nn.Linear(32, 7), nn.Tanh(), nn.Linear(320, 9), nn.Tanh(), nn.Linear(7, 1)]
    return nn.Sequential(*layers).bfloat16()


def made(kind, seed=0, sharded=True, **settings):
    model = shard(net(seed)) if sharded else net(seed)
    own = {
        **SETTINGS,
        "saliency": mask_of(net()),
        **({"momentum": 0.9} if kind is KINDS[0] else {}),
    }
    return model, kind(model.named_parameters(), **{**own, **COMPACT, **settings})


def gathered(value):
    """gloo knows no int16."""
    return whole(value.to(torch.int32) if value.dtype == torch.int16 else value).clone()


def everything(model, optimizer):
    found = {(name, "param"): whole(p).clone() for name, p in model.named_parameters()}
    return found | {
        (name, key): gathered(v)
        for name, p in model.named_parameters()
        for key, v in optimizer.state.get(p, {}).items()
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def train(pair, start, stop):
    for step in range(start, stop):
        step_both([pair[0]], [pair[1]], step, 2)


def shards_are_whole_tensors():
    """Bits, where nothing is dithered, which depends on the place in a shard."""
    for kind in KINDS:
        exact = {"state_dtype": torch.float32, "weight_bits": 32}
        pairs = [made(kind, sharded=s, **exact) for s in (False, True)]
        for step in range(8):
            step_both([p[0] for p in pairs], [p[1] for p in pairs], step, 2)
        assert_same(everything(*pairs[1]), everything(*pairs[0]))
        # the groups are the same ones, so after a first step of equal gradients the scales are
        pairs = [made(kind, sharded=s) for s in (False, True)]
        step_both([p[0] for p in pairs], [p[1] for p in pairs], 0, 2)
        theirs, ours = (
            {k: v for k, v in everything(*p).items() if k[1].endswith("scales")} for p in pairs
        )
        assert len(theirs) == 2
        assert_same(ours, theirs)


def stopped_and_resumed(folder):
    for kind in KINDS:
        straight = made(kind)
        train(straight, 0, 8)
        part = made(kind)
        train(part, 0, 4)
        assert part[1].mid_cycle
        state = {
            "model": get_model_state_dict(part[0]),
            "optimizer": get_optimizer_state_dict(*part),
        }
        saved = state["optimizer"]["state"]["2.weight"]
        moment = "exp_avg" if kind is KINDS[1] else "momentum_buffer"
        assert saved[moment].dtype == torch.float32
        assert isinstance(saved["correction"], DTensor)
        dcp.save(state, checkpoint_id=f"{folder}/{kind.__name__}")
        again = made(kind, seed=1)
        state = {
            "model": get_model_state_dict(again[0]),
            "optimizer": get_optimizer_state_dict(*again),
        }
        dcp.load(state, checkpoint_id=f"{folder}/{kind.__name__}")
        set_model_state_dict(again[0], state["model"])
        set_optimizer_state_dict(*again, state["optimizer"])
        assert_same(everything(*again), everything(*part))
        train(again, 4, 8)
        assert_same(everything(*again), everything(*straight))


def slow_weights_are_away(folder):
    """Each rank's shard of them on the host; a checkpoint goes on with them on the device."""
    lanes.pretend()
    for kind in KINDS:
        here, there = made(kind), made(kind, slow_device="cpu")
        train(here, 0, 8)
        train(there, 0, 4)
        assert there[1].mid_cycle
        slow = there[1].state[there[0][2].weight]["slow"]
        assert isinstance(slow, DTensor)
        again = made(kind, seed=1)
        states = []
        for pair in (there, again):
            states.append({"optimizer": get_optimizer_state_dict(*pair)})
            states[-1]["model"] = get_model_state_dict(pair[0])
        dcp.save(states[0], checkpoint_id=f"{folder}/{kind.__name__}")
        dcp.load(states[1], checkpoint_id=f"{folder}/{kind.__name__}")
        set_model_state_dict(again[0], states[1]["model"])
        set_optimizer_state_dict(*again, states[1]["optimizer"])
        for pair in (there, again):
            train(pair, 4, 8)
            settle(pair[1])
            assert_same(everything(*pair), everything(*here))


def other_placements_are_refused():
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(torch.ones(4, 64), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"state_dtype: expected .* first dimension"):
        KINDS[1]([weight], state_dtype=torch.int8)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_are_whole_tensors(world_size):
    on_ranks(world_size, shards_are_whole_tensors)


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_checkpoint_in_mid_cycle(world_size, tmp_path):
    on_ranks(world_size, stopped_and_resumed, str(tmp_path))


def test_slow_weights_are_away(tmp_path):
    on_ranks(2, slow_weights_are_away, str(tmp_path))


def test_other_placements_are_refused():
    on_ranks(2, other_placements_are_refused)
