"""torch.distributed.checkpoint: loaded on as many or other ranks, in mid-cycle, bits kept."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from sharded import EVERYTHING, KINDS, assert_state_is_placed, mask_of, net, shard, step_both, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

OPTIONS = {
    "plain": {},
    "full": {"full_state_dict": True},
    "offload": {"full_state_dict": True, "cpu_offload": True},
    "flat": {"flatten_optimizer_state_dict": True},
    "on_cpu": {"cpu_offload": True},
}
STEPS, STOP = 8, 4  # cycles of a forget and two retain steps: stopped after the second forget step


def made(kind, seed=0):
    model = shard(net(seed=seed))
    settings = {**EVERYTHING[kind], "retain_steps": 2, "saliency": mask_of(net())}
    return model, kind(model.named_parameters(), **settings)


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        step_both([model], [optimizer], step, 2)


def everything(model, optimizer):
    found = {(name, "param"): whole(p).clone() for name, p in model.named_parameters()}
    return found | {
        (name, key): whole(v).clone()
        for name, p in model.named_parameters()
        for key, v in optimizer.state.get(p, {}).items()
    }


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype, key  # noqa: PT018
    return True


def in_memory_and_on_disk(folder):
    turns = {KINDS[0]: ("plain", "offload"), KINDS[1]: ("full", "flat", "on_cpu")}
    if dist.get_world_size() > 2:
        turns = {KINDS[0]: ("flat",), KINDS[1]: ("plain",)}
    for kind, names in turns.items():
        whole_run = made(kind)
        train(*whole_run, 0, STEPS)
        for name in names:
            chosen = OPTIONS[name]
            options = StateDictOptions(**chosen)
            part = made(kind)
            train(*part, 0, STOP)
            assert part[1].mid_cycle
            state = {
                "model": get_model_state_dict(part[0]),
                "optimizer": get_optimizer_state_dict(*part, options=options),
            }
            place = f"{folder}/{kind.__name__}-{name}"
            dcp.save(state, checkpoint_id=place)
            model, optimizer = made(kind, seed=1)
            state = {
                "model": get_model_state_dict(model),
                "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
            }
            dcp.load(state, checkpoint_id=place)
            set_model_state_dict(model, state["model"])
            if name == "offload":  # torch gives it to the first rank only, and asks to be told
                options = StateDictOptions(**chosen, broadcast_from_rank0=True)
                assert bool(state["optimizer"]) == (dist.get_rank() == 0)
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
            assert optimizer.mid_cycle
            same(everything(model, optimizer), everything(*part))
            assert_state_is_placed(model, optimizer)
            train(model, optimizer, STOP, STEPS)
            same(everything(model, optimizer), everything(*whole_run))
            train(*part, STOP, STEPS)  # who was saved goes on as well
            same(everything(*part), everything(*whole_run))


@pytest.mark.checklist("C7", "C5", "C4")
@pytest.mark.parametrize("world_size", [2, 3])
def test_round_trip_in_mid_cycle(world_size, tmp_path):
    """Even, uneven and empty shards; the run that was stopped ends with the bits of the one that
    was not.
    """
    on_ranks(world_size, in_memory_and_on_disk, str(tmp_path))


def one_leg(kind, folder, start, stop):
    """Load what the leg before has saved, go on, save; the same gradients whatever the number of
    ranks.
    """
    model, optimizer = made(kind, seed=start)
    if start:
        state = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.load(state, checkpoint_id=f"{folder}/{start}")
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert_state_is_placed(model, optimizer)
    train(model, optimizer, start, stop)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=f"{folder}/{stop}")
    return everything(model, optimizer), optimizer.mid_cycle


@pytest.mark.checklist("C7")
@pytest.mark.parametrize("kind", KINDS)
def test_resharding_2_to_1_to_3(kind, tmp_path):
    """No clip here, so the whole run is elementwise and does not depend on the number of ranks in
    any bit.
    """
    straight, _ = on_ranks(2, one_leg, kind, str(tmp_path / "straight"), 0, 8)[0]
    for world_size, start, stop in ((2, 0, 2), (1, 2, 4), (3, 4, 8)):
        ends = on_ranks(world_size, one_leg, kind, str(tmp_path), start, stop)
        assert {cycle for _, cycle in ends} == {True}  # each leg stops inside a cycle
        assert all(same(found, ends[0][0]) for found, _ in ends)
    assert same(ends[0][0], straight)


def keys_of(optimizer):
    params = [p for g in optimizer.param_groups for p in g["params"]]
    keys = [sorted(optimizer.state.get(p, {})) for p in params]
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, keys)
    return everywhere


def gradients_on_some_ranks(folder):
    for kind in KINDS:
        # DDP gives all ranks a gradient if any has one, and none where none has
        model = net()
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = kind(model.named_parameters(), lr=0.1, slow_lr=0.5)
        x = torch.ones(2, 5)
        hidden = parallel.module[0](x)
        model.forward = lambda x, m=model: m[2](m[0](x)) if dist.get_rank() else m[0](x)
        parallel(x).sum().backward()
        optimizer.forget_step()
        everywhere = keys_of(optimizer)
        assert all(keys == everywhere[0] for keys in everywhere), everywhere
        assert hidden.shape == (2, 7)
        # where gradients differ from rank to rank, init_state makes the keys alike, and the
        # checkpoint is whole
        model, optimizer = made(kind)
        optimizer.init_state()
        skipped = ("0.weight", "4.bias") if dist.get_rank() == 0 else ("2.bias",)
        step_both([model], [optimizer], 0, 2, without=skipped)
        everywhere = keys_of(optimizer)
        assert all(keys == everywhere[0] and all(keys) for keys in everywhere), everywhere
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=f"{folder}/{kind.__name__}")
        again, fresh = made(kind)
        state = {"optimizer": get_optimizer_state_dict(again, fresh)}
        dcp.load(state, checkpoint_id=f"{folder}/{kind.__name__}")
        set_optimizer_state_dict(again, fresh, state["optimizer"])
        ours, theirs = everything(again, fresh), everything(model, optimizer)
        # but for counts, of which there is one for all ranks
        same(
            *(
                {k: v for k, v in found.items() if not k[1].endswith(("param", "step"))}
                for found in (ours, theirs)
            )
        )


@pytest.mark.checklist("C10")
def test_the_same_keys_on_every_rank(tmp_path):
    on_ranks(2, gradients_on_some_ranks, str(tmp_path))


def asked_for_nothing():
    """The engine asks a stateless optimizer by a step of lr 0 on zeros: no weight and no phase
    moves.
    """
    model, optimizer = made(KINDS[1])
    before = everything(model, optimizer)
    get_optimizer_state_dict(model, optimizer)
    found = everything(model, optimizer)
    same({k: v for k, v in found.items() if k[1] == "param"}, before)
    assert not optimizer.mid_cycle
    assert all(whole(optimizer.state[p]["step"]) == 0 for p in model.parameters())


@pytest.mark.checklist("B5", "C6")
def test_asking_for_the_state_of_a_sharded_optimizer_moves_nothing():
    on_ranks(2, asked_for_nothing)


def zeros_on_one_rank():
    """A schedule at lr 0, and gradients that are zero in one rank's shards: a step on all, or the
    phases part.
    """
    model, optimizer = made(KINDS[0])
    step_both([model], [optimizer], 0, 2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    pending = []
    for moves in (True, False):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if moves and dist.get_rank() == 0:
            next(model.parameters()).grad.to_local().fill_(1.0)
        optimizer.step()
        pending.append(optimizer.param_groups[0]["retain_pending"])
    return pending


@pytest.mark.checklist("B5", "F4")
def test_a_step_counts_on_all_ranks_or_on_none():
    assert on_ranks(2, zeros_on_one_rank) == [[1, 1]] * 2


def whole_states_refused():
    for kind in KINDS:
        models = net(), shard(net())
        settings = {**EVERYTHING[kind], "retain_steps": 1}
        optimizers = [kind(m.named_parameters(), **settings) for m in models]
        for step in range(2):
            step_both(models, optimizers, step, 1)
        before = everything(models[1], optimizers[1])
        for mine, theirs in (optimizers, optimizers[::-1]):
            with pytest.raises(
                ValueError, match=r"state_dict: expected .* set_optimizer_state_dict"
            ):
                mine.load_state_dict(theirs.state_dict())
        assert same(everything(models[1], optimizers[1]), before)
        assert all(isinstance(p, DTensor) for p in models[1].parameters())


@pytest.mark.checklist("C4")
def test_states_placed_otherwise_are_refused():
    """torch would keep a whole tensor beside a shard."""
    on_ranks(2, whole_states_refused)
