"""step_in_backward on shards: the ordinary sharded step's bits, no whole gradient on a rank."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from sharded import EVERYTHING, KINDS, assert_equal, mask_of, net, shard
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from sfron_fast import step_in_backward


def cycles(kind, inside, **options):
    """Two cycles with each rank's data; which gradients are left after every retain backward."""
    model = net()
    saliency = mask_of(model)
    shard(model, **options)
    optimizer = kind(
        model.named_parameters(),
        saliency=saliency,
        max_norm=1.0,
        retain_steps=2,
        **EVERYTHING[kind],
    )
    left = 0
    for step in range(6):
        optimizer.zero_grad()
        data = torch.Generator().manual_seed(10 * step + dist.get_rank())
        loss = model(torch.randn(4, 5, generator=data)).square().mean()
        if not optimizer.mid_cycle:
            (-loss).backward()
            optimizer.forget_step()
            continue
        if inside:
            with step_in_backward(optimizer):
                loss.backward()
            left += sum(p.grad is not None for p in model.parameters())
        else:
            loss.backward()
        optimizer.step()
    return model, optimizer, left


def both_ways():
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for kind in KINDS:
        for options in (
            {},
            {"mp_policy": low},
            {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        ):
            after, inside = (cycles(kind, inside, **options) for inside in (False, True))
            assert_equal((after[0], inside[0]), (after[1], inside[1]))
            assert inside[2] == 0
    model = DistributedDataParallel(net())
    with (
        pytest.raises(RuntimeError, match="in a job of 2 ranks"),
        step_in_backward(KINDS[0](model.parameters())),
    ):
        pass


def test_the_bits_of_the_ordinary_sharded_step():
    on_ranks(2, both_ways)
