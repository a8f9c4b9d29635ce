"""Several processes that share every batch: how many samples each has, and the gradient of them
all.

torch's own engine moves the data: a plain model's gradients are all-reduced here, FSDP2 reduces
those of its own.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.batches import check_model, model_device
from ..errors import require
from ..ops.adaptive_weights import formula, portion
from ..ops.layout import is_sharded
from .shards import check_whole

DDP = nn.parallel.DistributedDataParallel if dist.is_available() else ()


def shared(model: nn.Module) -> bool:
    """Whether other processes have a part in it, by DDP, FSDP or DTensors; also inside
    torch.compile.
    """
    wrapped = any(isinstance(module, DDP) for module in model.modules()) or _sharded_modules(model)
    return bool(wrapped) or any(
        is_sharded(p) or hasattr(p, "_fsdp_flattened") for p in model.parameters()
    )


def _sharded_modules(model: nn.Module) -> list[Any]:
    """Those that ``fully_shard`` was applied to."""
    # nobody has imported it: nothing is sharded by it
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return (
        []
        if fsdp is None
        else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    )


def check_offload(weights: torch.device, mesh: torch.device, group: Any) -> None:
    """Offloaded weights are gathered where they lie, which NCCL alone cannot.

    Raises:
        ValueError: the group has no backend for them.
    """
    backends = dist.get_backend_config(group)
    require(
        weights.type == mesh.type or f"{weights.type}:" in backends,
        "group",
        f"one with a backend for weights offloaded to the {weights.type}",
        backends,
        'use init_process_group("cpu:gloo,cuda:nccl")',
    )


class Ranks:
    """A process group with one model; or, with ``group`` None, this process alone, which asks
    nobody.
    """

    def __init__(self, model: nn.Module, group: Any) -> None:
        check_model(model)
        check_whole(list(model.parameters()))
        bare = getattr(model, "_orig_mod", model)  # of torch.compile
        # DDP has no use for autograd.grad
        self.model: Any = bare.module if isinstance(bare, DDP) else model
        self._root = model
        self.reshard()
        self.group = group
        self.sharded = any(map(is_sharded, model.parameters()))
        none = "torch.distributed.group.WORLD is all of them"
        require(
            group is not None or not shared(model),
            "group",
            "the process group that shares the "
            "batches, for a model of DistributedDataParallel or fully_shard",
            "None",
            none,
        )
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.device = model_device(model)  # where inputs go, and what the ranks tell each other
        if self.sharded:
            self._check_meshes(bare)

    def _check_meshes(self, root: nn.Module) -> None:
        """FSDP2 averages over its mesh; the loss is weighted for that average."""
        from torch.distributed.fsdp import FSDPModule

        require(
            isinstance(root, FSDPModule),
            "model",
            "one whose root is sharded by fully_shard",
            "DTensors of another origin",
            "apply fully_shard to the model itself too",
        )
        meshes: set[Any] = {p.device_mesh for p in self.model.parameters() if is_sharded(p)}
        # also for offloaded weights
        self.device = torch.device(next(iter(meshes)).device_type, self.device.index)
        check_offload(next(self.model.parameters()).device, self.device, self.group)
        for mesh in meshes:
            require(
                mesh.size() == self.size,
                "group",
                f"the {mesh.size()} ranks that the model is sharded over",
                self.size,
            )

    def reshard(self) -> None:
        """After a forward pass without a backward: FSDP2's root stays gathered, and looks plain."""
        for module in _sharded_modules(self._root):
            module.reshard()

    def rounds(self, batches: Iterable[tuple[Any, int]]) -> Iterator[tuple[Any, list[int]]]:
        """(batch, samples by rank) of (batch, its samples), as long as any rank has a batch.

        A rank without samples gets None; of a sharded model, which needs every rank to run it, its
        last batch.
        """
        if self.group is None:
            yield from ((batch, [count]) for batch, count in batches if count)
            return
        iterator, before, started = iter(batches), None, [False] * self.size
        while True:
            batch, count, error = None, 0, None
            try:
                batch, count = next(iterator, (None, 0))
            except Exception as problem:
                error = problem
            found = self.exchange(error, batch is not None, count)
            if not any(there for there, _ in found):
                return
            counts = [count for _, count in found]
            started = [s or count > 0 for s, count in zip(started, counts, strict=True)]
            if counts[self.rank]:
                before = batch
            if sum(counts):
                ok = all(started) or not self.sharded
                require(
                    ok,
                    "loader",
                    "a sample on every rank in the first batch, for a sharded model",
                    counts,
                )
                yield (before if counts[self.rank] or self.sharded else None), counts

    def exchange(self, error: Exception | None, *numbers: int) -> list[list[int]]:
        """The numbers of every rank; an error of one is raised on all, so that nobody waits.

        Raises:
            ValueError: "rank R: ..." where another rank has refused something.
            RuntimeError: another rank has failed otherwise.
        """
        try:
            found = self._gather(error is not None, *numbers)
        except RuntimeError:
            if error is not None:  # the others wait elsewhere, and end with this rank
                raise error from None
            raise
        if any(failed for failed, *_ in found):
            told: list[Any] = [None] * self.size
            mine = None if error is None else (isinstance(error, ValueError), str(error))
            dist.all_gather_object(told, mine, group=self.group)
            if error is not None:
                raise error
            rank, (refused, text) = next((r, t) for r, t in enumerate(told) if t is not None)
            raise (ValueError if refused else RuntimeError)(f"rank {rank}: {text}")
        return [rest for _, *rest in found]

    @contextmanager
    def together(self, *, waiting: bool = True) -> Iterator[None]:
        """What one rank raises inside, all raise; within, the ranks tell each other nothing, or all
        the same.

        ``waiting``: also where the answer waits for a GPU. Else an error there ends its own rank,
        and the launcher the others.
        """
        if self.group is None or not (waiting or self.device.type == "cpu"):
            yield
            return
        error = None
        try:
            yield
        except Exception as problem:
            error = problem
        self.exchange(error)

    @contextmanager
    def first_warns(self) -> Iterator[None]:
        """RuntimeWarnings inside are the first rank's: what all would say, one says."""
        if self.rank == 0:
            yield
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield

    def _gather(self, *numbers: int) -> list[list[int]]:
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        return torch.stack(everyone).tolist()

    def any(self, flags: list[bool]) -> list[bool]:
        """Which flags are set on any rank."""
        if self.group is None:
            return flags
        found = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return found.bool().tolist()

    def gradients(
        self, loss: Tensor | None, share: float, params: dict[str, nn.Parameter]
    ) -> list[Tensor | None]:
        """Each parameter's of the mean loss over all samples, the same on every rank; None where
        none of them reached it.

        ``loss``: the mean over this rank's samples, which are ``share`` of all; None if it has
        none.
        """
        if self.sharded:
            return self._sharded_gradients(loss, share, params)
        found: Any = [None] * len(params)
        if loss is not None:
            part = loss if share == 1.0 else loss * share
            found = torch.autograd.grad(part, list(params.values()), allow_unused=True)
        if self.group is not None:
            found = self._sum(list(params.values()), found)
        return list(found)

    def _sum(self, params: list[nn.Parameter], found: Any) -> list[Tensor | None]:
        reached = self.any([g is not None for g in found])
        whole = [
            torch.zeros_like(p) if g is None else g.clone(memory_format=torch.contiguous_format)
            for g, p in zip(found, params, strict=True)
        ]
        whole = [g if r else None for g, r in zip(whole, reached, strict=True)]
        for work in [
            dist.all_reduce(g, group=self.group, async_op=True) for g in whole if g is not None
        ]:
            work.wait()
        return whole

    def _sharded_gradients(
        self, loss: Any, share: float, params: dict[str, nn.Parameter]
    ) -> list[Tensor | None]:
        before = {n: p.grad for n, p in params.items()}
        for p in params.values():
            p.grad = None
        (loss * (share * self.size)).backward()  # FSDP2 averages
        found = [p.grad for p in params.values()]
        for n, p in params.items():
            p.grad = before[n]
        return found

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each."""
        if self.group is None:
            return values
        total = values.detach().to(self.device, copy=True)
        dist.all_reduce(total, group=self.group)
        return total

    def portion(self, losses: Tensor, temperature: float, floor: float, counted: Tensor) -> Tensor:
        """What turns the adaptive loss of this rank's samples that are ``counted`` (bool [samples])
        into its summand of that of all ranks, times their number: [].
        """
        log_normaliser = formula(losses, temperature, floor, counted)[1]
        return portion(log_normaliser.to(self.device), self.group)

    def share_buffers(self) -> None:
        """Every buffer as the first rank has it, as DDP does before a forward pass."""
        if self.group is None:
            return
        first = dist.get_global_rank(self.group, 0)
        for buffer in self.model.buffers():
            there = buffer.to(self.device)
            dist.broadcast(there, first, group=self.group)
            if there is not buffer:
                buffer.copy_(there)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add up over the ranks, in place."""
        if self.group is not None:
            for work in [dist.all_reduce(t, group=self.group, async_op=True) for t in tensors]:
                work.wait()
