"""One mask for many launchers: names and shards of wrapped models; wrappers that are refused."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharded import KINDS, mask_of, net, placed, shard, whole
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sfron_fast import SaliencyMask, SFRonSGD, estimate_fisher
from sfron_fast.ops import reference


def checkpointed(model):
    return nn.Sequential(*(checkpoint_wrapper(layer) for layer in model))


def compiled(model):
    return torch.compile(model, backend="eager")


class Base(nn.Module):
    """PEFT's names: base_model.model.<name>, and base_layer inside an adapter."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        for i in (0, 2):
            layer, model[i] = model[i], nn.Module()
            model[i].base_layer = layer


WRAPPERS = {
    "plain": lambda model: model,
    "ddp": DistributedDataParallel,
    "compiled": compiled,
    "checkpointed": checkpointed,
    "peft": Base,
    "fsdp": shard,
    "fsdp_checkpointed": lambda model: fully_shard(checkpointed(model)),
    "fsdp_compiled": lambda model: compiled(shard(model)),
    "compiled_ddp": lambda model: compiled(DistributedDataParallel(model)),
    "fsdp_peft": lambda model: fully_shard(Base(model)),
    "hsdp": lambda model: shard(
        model,
        mesh=init_device_mesh(
            "cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard")
        ),
    ),
}


def one_mask_for_all():
    mask = mask_of(net())
    alone = net()
    stepped(alone, mask)
    wanted = {n: p.detach() for n, p in alone.named_parameters()}
    names = set()
    for kind, wrap in WRAPPERS.items():
        model = wrap(net())
        names |= {n for n, _ in model.named_parameters()}
        assert not mask.coverage(model.named_parameters())["unmatched"], kind
        stepped(model, mask)
        found = [whole(p) for p in model.parameters()]
        assert all(map(torch.equal, found, wanted.values())), kind
        # and back: from Fishers named and placed as the model's parameters
        sides = [
            {
                n: placed(mask.to_bool(n).float() * factor + 0.25, p)
                for n, p in model.named_parameters()
            }
            for factor in (1.0, 0.5)
        ]
        again = SaliencyMask.from_fisher(forget=sides[0], retain=sides[1], threshold=1.25)
        assert again == mask, kind
    assert len(names) == 6 * 6, names  # six ways to call a parameter


def stepped(model, mask):
    optimizer = SFRonSGD(model.named_parameters(), lr=0.1, saliency=mask)
    generator = torch.Generator().manual_seed(4)
    for p in model.parameters():
        p.grad = placed(torch.randn(p.shape, generator=generator), p)
    optimizer.forget_step()


@pytest.mark.checklist("F5", "E6")
def test_one_mask_for_every_wrapper_and_back():
    on_ranks(2, one_mask_for_all)


def bits_of_shards():
    """Every shard's bits against the selection itself, with shards that begin inside a byte."""
    model = shard(net())
    mask = mask_of(net())
    begins = set()
    for (name, p), packed in zip(
        model.named_parameters(), mask.resolve(model.named_parameters()), strict=True
    ):
        local = p.to_local()
        assert packed.shape == ((local.numel() + 7) // 8,)
        rows = mask.to_bool(name).split(
            [len(c) for c in torch.empty(p.shape[0]).chunk(dist.get_world_size())]
        )
        ours = rows[dist.get_rank()] if dist.get_rank() < len(rows) else rows[0][:0]
        assert torch.equal(reference.unpack_bits(packed, local.shape), ours), name
        begins.add(sum(r.numel() for r in rows[: dist.get_rank()]) % 8)
    return begins


@pytest.mark.checklist("F5")
def test_shards_that_begin_inside_a_byte():
    assert set.union(*on_ranks(3, bits_of_shards)) - {0}


def sharded_after_construction():
    """Frameworks replace the parameters of an optimizer by sharded ones: masks are found again by
    name.
    """
    mask = mask_of(net())
    alone, model = net(), net()
    optimizers = [SFRonSGD(m.named_parameters(), lr=0.1, saliency=mask) for m in (alone, model)]
    generator = torch.Generator().manual_seed(4)
    for turn in range(2):
        if turn:
            shard(model)
            optimizers[1].param_groups[0]["params"] = list(model.parameters())
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = placed(p.grad, q)
        for optimizer in optimizers:
            optimizer.forget_step()
            optimizer.step()
    assert all(
        torch.equal(p, whole(q))
        for p, q in zip(alone.parameters(), model.parameters(), strict=True)
    )


@pytest.mark.checklist("F5")
def test_parameters_sharded_after_construction():
    on_ranks(2, sharded_after_construction)


def fishers_of_compiled():
    batches = [(torch.full((2, 5), float(dist.get_rank())), torch.ones(2, 1))]
    for inside in (DistributedDataParallel, shard):
        wanted = estimate_fisher(
            inside(net()), batches, nn.functional.mse_loss, group=dist.group.WORLD
        )
        model = compiled(inside(net()))
        with pytest.raises(ValueError, match="group: expected the process group"):
            estimate_fisher(model, batches, nn.functional.mse_loss)
        found = estimate_fisher(model, batches, nn.functional.mse_loss, group=dist.group.WORLD)
        for one, other in zip(wanted.values(), found.values(), strict=True):
            torch.testing.assert_close(whole(other), whole(one), rtol=1e-5, atol=1e-12)


@pytest.mark.checklist("E6", "F3")
def test_compiling_hides_no_wrapper_from_a_fisher():
    on_ranks(2, fishers_of_compiled)


# --- refused --------------------------------------------------------------------------------------


def flattened_by_fsdp1():
    for kind in KINDS:
        for original in (False, True):
            model = FullyShardedDataParallel(
                net(), use_orig_params=original, device_id=torch.device("cpu")
            )
            for refuse in (
                lambda m, k=kind: k(m.parameters(), lr=0.1),
                lambda m: estimate_fisher(m, []),
            ):
                with pytest.raises(
                    ValueError, match=r"params: expected .* FullyShardedDataParallel.* fully_shard"
                ):
                    refuse(model)


@pytest.mark.checklist("F7")
def test_fsdp1_is_refused():
    on_ranks(2, flattened_by_fsdp1)


@pytest.mark.checklist("F7")
@pytest.mark.parametrize("kind", KINDS)
def test_deepspeed_zero_is_refused(kind):
    """Not installed here: its marks on parameters (stage 3), and its flat groups (stages 1 and 2),
    by hand.
    """
    model = net()
    model[0].weight.ds_id = 0
    with pytest.raises(ValueError, match=r"params: expected .* DeepSpeed ZeRO.* fully_shard"):
        kind(model.parameters(), lr=0.1)
    for saliency in (None, mask_of(net())):
        model = net()
        optimizer = kind(model.named_parameters(), lr=0.1, saliency=saliency)
        flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        flat.grad = torch.ones_like(flat)
        optimizer.param_groups[0]["params"] = [flat]
        for step in (optimizer.forget_step, optimizer.step):
            with pytest.raises(
                ValueError, match=r"params: expected the 6 .* DeepSpeed ZeRO.* fully_shard"
            ):
                step()
        assert not optimizer.mid_cycle
