"""The harness itself: values, failures, deaths and hangs of ranks reach the test."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, outcomes


def total_of_ranks(plus):
    total = torch.tensor(float(dist.get_rank() + plus))
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), total.item()


def raises_on_one():
    if dist.get_rank() == 1:
        raise ValueError("no luck on this rank")
    dist.barrier()


def dies_on_one():
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def hangs_on_one():
    if dist.get_rank() == 1:
        time.sleep(1000)


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_are_one_group(world_size):
    everyone = sum(rank + 2 for rank in range(world_size))
    assert on_ranks(world_size, total_of_ranks, 2) == [
        (r, world_size, everyone) for r in range(world_size)
    ]


def test_a_failure_shows_its_traceback():
    with pytest.raises(
        AssertionError, match=r"(?s)rank 1 of 2.*raises_on_one.*no luck on this rank"
    ):
        on_ranks(2, raises_on_one)


def test_deaths_and_hangs_are_told():
    assert outcomes(2, dies_on_one)[1].exitcode == 7
    # long enough for the ranks to meet first, on a busy machine too
    hung = outcomes(2, hangs_on_one, timeout=12.0)[1]
    assert hung.exitcode is None
    assert "no answer in time" in hung.error
