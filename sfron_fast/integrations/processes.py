"""The command under torchrun: one process a GPU, and the model sharded over them by FSDP2."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import require

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def first(self, call: Callable[[], T]) -> T:
        """What ``call`` returns in the first process, for all of them.

        Raises:
            ValueError: what it refuses there, everywhere.
        """
        if self.size == 1:
            return call()
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = call()
            except ValueError as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, 0)
        if told[1] is not None:
            raise ValueError(told[1])
        found: T = told[0]
        return found

    def all(self, mine: T) -> list[T]:
        """What each process has, by rank."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def shard(self, model: Any) -> Any:
        """The model over all processes, block by block."""
        if self.size == 1:
            return model
        from torch.distributed.fsdp import fully_shard

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = set(getattr(base, "_no_split_modules", None) or ())
        for module in base.modules():
            if type(module).__name__ in names:
                fully_shard(module)
        return fully_shard(model)

    def gathered(self, model: Any) -> dict[str, Any]:
        """The whole state on the CPU of the first process; the others get nothing."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        model.reshard()  # after a forward pass alone the root is still gathered
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=options)


ALONE = Processes()


@contextmanager
def started(device: str) -> Iterator[Processes]:
    """Those that torchrun has started, in a process group; or this one alone.

    Raises:
        ValueError: fewer GPUs than processes on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(device=device)
        return
    if device.startswith("cuda"):
        place, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        fits = place < found
        require(fits, "nproc-per-node", f"at most the {found} GPUs", f"process {place + 1}")
        torch.cuda.set_device(place)
        device = f"cuda:{place}"
    begun = not dist.is_initialized()
    if begun:
        # gloo beside NCCL: checkpoints and what is told are on the CPU
        dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        yield Processes(dist.get_rank(), size, device)
    finally:
        if begun:
            dist.destroy_process_group()
