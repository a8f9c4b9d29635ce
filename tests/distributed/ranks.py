"""Runs a function in several processes that are the ranks of one gloo group, on the CPU.

The processes are forked from a server that has torch imported, so that starting them takes a
fraction of a second. What a rank returns or raises comes back to the test; a rank that hangs is
ended.
"""

import multiprocessing
import os
import pickle
import random
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from typing import Any, NamedTuple

import numpy
import torch
import torch.distributed as dist

TIMEOUT = 900.0  # seconds; the machine may be busy
GRACE = 20.0  # for the other ranks, once one has failed: gloo tells them that it is gone
PRELOAD = [
    "pytest",
    "sfron_fast",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict",
    "torch.nn.parallel",
    "torch.distributed.tensor",
    "torch._dynamo",
]


class Outcome(NamedTuple):
    """How a rank ended: with a value, an error (its traceback as text), or killed (neither)."""

    value: Any
    error: str | None
    exitcode: int | None  # None: it was still running at the time-out, and was killed


def on_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """``function(*args)`` on every rank of a default process group; the values by rank.

    The function is pickled: it stands at the top of a module. Rank and size are
    ``torch.distributed``'s.

    Raises:
        AssertionError: with the tracebacks of the ranks that failed.
    """
    ends = outcomes(world_size, function, *args, timeout=timeout)
    bad = [
        f"--- rank {rank} of {world_size}, exit code {end.exitcode}:\n{end.error or 'no error'}"
        for rank, end in enumerate(ends)
        if end.error is not None or end.exitcode != 0
    ]
    assert not bad, "\n".join(["", *bad])
    return [end.value for end in ends]


def outcomes(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT
) -> list[Outcome]:
    """As ``on_ranks``, but tells how every rank ended instead of raising."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        job = (rank, world_size, store.port, timeout, theirs, function, args)
        process = context.Process(target=_rank, args=job, daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    ends = _collect(processes, pipes, time.monotonic() + timeout)
    for process in processes:
        process.close()
    return ends


def _collect(processes: list[Any], pipes: list[Any], deadline: float) -> list[Outcome]:
    found: dict[int, tuple[Any, str | None]] = {}
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes and time.monotonic() < deadline:
        for pipe in connection.wait(
            list(open_pipes), timeout=max(0.0, deadline - time.monotonic())
        ):
            rank = open_pipes.pop(pipe)
            try:
                found[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:  # it died
                found[rank] = (None, None)
            processes[rank].join(GRACE)
            if found[rank][1] is not None or processes[rank].exitcode != 0:
                deadline = min(deadline, time.monotonic() + GRACE)
    ends = []
    for rank, process in enumerate(processes):
        exitcode = process.exitcode
        if exitcode is None:
            process.kill()
            process.join()
        ends.append(Outcome(*found.get(rank, (None, "no answer in time: killed")), exitcode))
    return ends


def _rank(
    rank: int,
    world_size: int,
    port: int,
    timeout: float,
    pipe: Any,
    function: Callable[..., Any],
    args: Any,
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # what is never written shows
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    limit = timedelta(seconds=timeout)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    try:
        # whole tensors, not handles to shared ones
        answer, failed = pickle.dumps((function(*args), None)), 0
    except BaseException:
        answer, failed = pickle.dumps((None, traceback.format_exc())), 1
    pipe.send_bytes(answer)
    pipe.close()
    if not failed:
        dist.destroy_process_group()
    os._exit(failed)
