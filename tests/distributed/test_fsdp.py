"""FSDP2: sharded parameters, gradients and states give what one process gives."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharded import (
    EVERYTHING,
    KINDS,
    assert_equal,
    assert_state_is_placed,
    mask_of,
    net,
    placed,
    shard,
    step_both,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

U = 2.0**-24  # the error of one rounded fp32 operation


def twins(kind, mask=True, prepare=shard, dtype=torch.float32, **settings):
    models = net(dtype), prepare(net(dtype))
    saliency = mask_of(models[0]) if mask else None
    optimizers = [kind(m.named_parameters(), saliency=saliency, **settings) for m in models]
    return models, optimizers


def same_gradients_same_bits():
    for kind in KINDS:
        for semantics in ("gradient", "update"):
            settings = {**EVERYTHING[kind], "retain_steps": 2, "mask_semantics": semantics}
            models, optimizers = twins(kind, **settings)
            for step in range(7):
                step_both(models, optimizers, step, 2)
            assert_equal(models, optimizers)
            assert_state_is_placed(models[1], optimizers[1])
    shapes = {p.to_local().shape[0] for p in models[1].parameters()}
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, shapes)
    assert 0 in set.union(*everywhere)  # an empty shard was among them
    assert all(len(s) > 1 for s in everywhere)


@pytest.mark.checklist("F4", "C4")
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_same_gradients_same_bits(world_size):
    """No clip: every operation is elementwise, so shards even, uneven and empty hold the bits of
    one process.
    """
    on_ranks(world_size, same_gradients_same_bits)


def clipped_steps():
    for kind in KINDS:
        settings = {"lr": 0.1, "max_norm": 0.5, "retain_steps": 1, "clip_retain": True}
        models, optimizers = twins(kind, **settings)
        for step in range(4):
            calls = mock.Mock(wraps=dist.all_reduce)
            with mock.patch.object(torch.distributed, "all_reduce", calls):
                step_both(models, optimizers, step, 1)
            assert calls.call_count == 1
            one, ours = (o.grad_norm for o in optimizers)
            # every shard's norm is rounded to fp32 (the root halves what its square adds), and so
            # are the total and the norm of one process
            assert (one - ours).abs() <= 3 * U * one
            everywhere = [torch.empty(()) for _ in range(dist.get_world_size())]
            dist.all_gather(everywhere, ours)
            assert len({norm.item() for norm in everywhere}) == 1
        # the norms differ by 3 U, so clipped gradients by 5 U, moments by a few more; AdamW's ratio
        # of moments again. No step moves a weight further than 0.1, and its value rounds
        # differently then: 2 U of it each time
        assert_equal(
            models, optimizers, lambda key, value: 4 * (10 * U * value.abs().max().clamp_min(1.0))
        )


@pytest.mark.checklist("B4", "F4")
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_norm_is_global_with_one_collective(world_size):
    on_ranks(world_size, clipped_steps)


def retain_steps_ask_nobody():
    models, optimizers = twins(KINDS[0], lr=0.1, max_norm=1.0, retain_steps=3)
    step_both(models, optimizers, 0, 3)
    with mock.patch.object(
        torch.distributed, "all_reduce", side_effect=AssertionError("a collective")
    ):
        step_both(models, optimizers, 1, 3)


def test_retain_steps_without_clip_need_no_collective():
    on_ranks(2, retain_steps_ask_nobody)


def overflow_on_one_rank():
    for kind in KINDS:
        model = shard(net())
        optimizer = kind(model.named_parameters(), lr=0.1, saliency=None)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = placed(torch.ones(p.shape), p)
        if dist.get_rank() == 1:
            next(model.parameters()).grad.to_local()[0] = float("nan")
        optimizer.forget_step()
        assert optimizer.skipped_steps == 1
        assert optimizer.mid_cycle
        for n, p in model.named_parameters():
            assert torch.equal(p.to_local(), before[n].to_local()), n


@pytest.mark.checklist("B10", "F4")
def test_an_overflow_on_one_rank_is_skipped_on_all():
    on_ranks(2, overflow_on_one_rank)


def gradients_on_one_rank_only():
    """Not what FSDP does; but whatever leads to it, nobody may wait for ever."""
    model = shard(net())
    optimizer = KINDS[0](model.named_parameters(), lr=0.1, max_norm=1.0)
    if dist.get_rank() == 0:
        for p in model.parameters():
            p.grad = placed(torch.ones(p.shape), p)
    optimizer.forget_step()
    return optimizer.grad_norm.item()


@pytest.mark.checklist("F4")
def test_a_rank_without_gradients_takes_part_in_the_norm():
    norms = on_ranks(2, gradients_on_one_rank_only)
    assert norms[0] == norms[1] > 0


def trained_end_to_end():
    """fp64, whose rounding (some 1000 operations of 2^-53 in a step) is far below any mistake."""
    for kind in KINDS:
        settings = {"lr": 0.05, "max_norm": 1.0, "retain_steps": 2, "slow_lr": 0.5}
        settings |= {"momentum": 0.9} if kind is KINDS[0] else {"eps": 1e-3}
        models, optimizers = twins(kind, dtype=torch.float64, **settings)
        generator = torch.Generator().manual_seed(5)
        for step in range(9):
            inputs = torch.randn(12, 5, dtype=torch.float64, generator=generator)
            parts = [inputs, inputs.chunk(dist.get_world_size())[dist.get_rank()]]
            for model, optimizer, part in zip(models, optimizers, parts, strict=True):
                optimizer.zero_grad()
                sign = -1.0 if step % 3 == 0 else 1.0
                (sign * (model(part) - part.sum(1, keepdim=True)).square().mean()).backward()
                (optimizer.step if step % 3 else optimizer.forget_step)()
        # the clip's norm is fp32 also here
        assert_equal(
            models, optimizers, lambda key, value: 9 * 10 * U * value.abs().max().clamp_min(1.0)
        )


@pytest.mark.checklist("F4")
@pytest.mark.parametrize("world_size", [2, 3])
def test_training_with_fully_shard(world_size):
    on_ranks(world_size, trained_end_to_end)


def offloaded():
    prepare = lambda model: shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))  # noqa: E731
    models, optimizers = twins(KINDS[0], prepare=prepare, **EVERYTHING[KINDS[0]])
    for step in range(4):
        step_both(models, optimizers, step, 1)
    assert_equal(models, optimizers)
    models[1](torch.randn(3, 5)).sum().backward()
    optimizers[1].forget_step()


@pytest.mark.checklist("F6")
def test_offloaded_parameters():
    """On a machine of CPUs they differ from others in the policy only; the code is the same with a
    GPU's mesh.
    """
    on_ranks(2, offloaded)


def meshes():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def both(model):
        """Replicated shards, shards of a mesh of its own, and parameters that are no DTensors: in
        one group.
        """
        fully_shard(model[0], mesh=mesh)
        fully_shard(model[2], mesh=mesh["shard"])
        return model

    def split_twice(model):
        for n, p in list(model[2].named_parameters()):
            placements = [Shard(0), Shard(p.dim() - 1)] if p.dim() == 2 else [Replicate(), Shard(0)]
            split = DTensor.from_local(
                placed_local(p, mesh, placements),
                mesh,
                placements,
                shape=p.shape,
                stride=p.stride(),
            )
            model[2].register_parameter(n, nn.Parameter(split))
        return both_but_middle(model)

    def both_but_middle(model):
        fully_shard(model[0], mesh=mesh)
        return model

    for prepare in (both, split_twice):
        for kind in KINDS:
            models, optimizers = twins(kind, prepare=prepare, **EVERYTHING[kind])
            kinds = {getattr(p, "placements", None) for p in models[1].parameters()}
            assert len(kinds) > 2
            for step in range(4):
                step_both(models, optimizers, step, 1)
                if step % 2 == 0:
                    one, ours = (o.grad_norm for o in optimizers)
                    assert (one - ours).abs() <= 4 * U * one  # and the norm over the meshes
            assert_equal(models, optimizers)


def placed_local(tensor, mesh, placements):
    return (
        distribute_tensor(tensor.detach().clone(), mesh, placements, src_data_rank=None)
        .to_local()
        .clone()
    )


@pytest.mark.checklist("F8")
def test_meshes_of_two_dimensions_and_several_in_one_group():
    on_ranks(4, meshes)


def unsummed_gradients():
    """As tensor parallelism leaves them on norms and biases: each rank holds a summand."""
    mesh = init_device_mesh("cpu", (2,))
    weight = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()]))
    optimizer = KINDS[0]([weight], lr=0.5, max_norm=100.0)
    for step in (optimizer.forget_step, optimizer.step):
        mine = torch.tensor([1.0, 2.0, 4.0]) * (dist.get_rank() + 1)
        weight.grad = DTensor.from_local(mine, mesh, [Partial()])
        step()
    assert optimizer.grad_norm == torch.tensor([3.0, 6.0, 12.0]).norm()
    return weight.to_local().tolist()


@pytest.mark.checklist("F8")
def test_gradients_that_are_yet_to_be_summed():
    assert on_ranks(2, unsummed_gradients) == [[-2.0, -5.0, -11.0]] * 2


def scaled():
    models, optimizers = twins(KINDS[0], mask=False, lr=0.125)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {n: p.detach().clone() for n, p in models[1].named_parameters()}
    for bad in (True, False):
        optimizers[1].zero_grad()
        inputs = torch.ones(2, 5)
        if bad and dist.get_rank() == 1:
            inputs[0] = float("inf")
        scaler.scale(models[1](inputs).sum()).backward()
        scaler.step(optimizers[1].forget)
        scaler.update()
        moved = [
            not torch.equal(p.to_local(), before[n].to_local())
            for n, p in models[1].named_parameters()
        ]
        assert any(moved) is not bad
        assert optimizers[1].mid_cycle is not bad
        assert scaler.get_scale() == 2.0


@pytest.mark.checklist("D3", "F4")
def test_a_scaler_skips_on_every_rank():
    on_ranks(2, scaled)


def compiled_steps():
    models, optimizers = twins(KINDS[0], lr=torch.tensor(0.125), momentum=0.5, clip_retain=True)
    optimizers[0].param_groups[0]["lr"] = 0.125
    step = torch.compile(optimizers[1].step, backend="eager")
    for i in range(3):
        step_both(models, optimizers[:1], 1, 1, seed=i)
        step()
    assert_equal(models, optimizers)


@pytest.mark.checklist("E1")
def test_a_compiled_step():
    on_ranks(2, compiled_steps)
