"""Forget and retain batches for one or many ranks, who share the same global batches."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..errors import by_keyword, require

Phase = Literal["forget", "retain"]
FORGET, RETAIN = 0, 1  # keys of the two streams' orders


class _Shares(Sampler[list[int]]):
    """One rank's part of every global batch from number ``start`` on, for ever; each pass is
    shuffled anew.

    What a pass has left over for no whole batch is dropped, other samples each time.
    """

    def __init__(
        self, samples: int, batch: int, rank: int, ranks: int, key: tuple[int, int]
    ) -> None:
        self.samples, self.batch, self.rank, self.ranks, self.key = samples, batch, rank, ranks, key
        self.per_pass, self.start = samples // batch, 0

    def __iter__(self) -> Iterator[list[int]]:
        passes, first = divmod(self.start, self.per_pass)
        while True:
            order = torch.randperm(self.samples, generator=_generator(*self.key, passes))
            for i in range(first, self.per_pass):
                yield order[i * self.batch : (i + 1) * self.batch][self.rank :: self.ranks].tolist()
            passes, first = passes + 1, 0


def _generator(*key: int) -> torch.Generator:
    """Seeded by all numbers of ``key``: neighbouring seeds and passes have nothing in common."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


class PairedLoader:
    """Per cycle one forget batch, then ``retain_steps`` retain batches: ``for phase, batch in
    loader``.

    Ranks draw different samples; together they draw what one process would, so the number of ranks
    changes no global batch. An epoch is a pass over the forget set; the retain set has passes of
    its own. Iterating goes on from the current place to the end of the epoch, and again to the end
    of the next. The place is one number: a state dict fits every rank, another number of ranks too,
    and is found again without loading what came before.

    Args:
        forget, retain: data sets with a length, indexed by sample.
        batch_size: samples of a step on all ranks together, a multiple of ``world_size``;
            ``batch_size / world_size`` on each. A smaller forget set is one whole batch in every
            cycle: no sample is repeated, and shares differ by one where it does not divide. Only a
            loss that is normalised over the ranks is then right; a rank's mean is not. It must have
            a sample for every rank.
        retain_steps: retain batches a cycle, the optimizer's.
        rank, world_size: of the data-parallel group; None = those of ``torch.distributed``, or one
            process.
        seed: of the orders, the same on all ranks.
        loading: what else DataLoader takes: ``num_workers``, ``collate_fn``, ``pin_memory``, ...

    Raises:
        ValueError: naming the argument.

    Random augmentation: without workers it draws from the process's generators (save them too, and
    seed ranks differently); a worker's generators start anew at the place a run resumes from. One
    batch is one step: a step that GradScaler skips is not drawn again, so use it with
    ``fused=True``, where a skipped step counts.
    """

    @by_keyword
    def __init__(
        self,
        *,
        forget: Dataset[Any],
        retain: Dataset[Any],
        batch_size: int,
        retain_steps: int,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        **loading: Any,
    ) -> None:
        known = dist.is_available() and dist.is_initialized()
        rank = (dist.get_rank() if known else 0) if rank is None else rank
        ranks = (dist.get_world_size() if known else 1) if world_size is None else world_size
        require(isinstance(ranks, int) and ranks >= 1, "world_size", "an integer >= 1", repr(ranks))
        require(
            isinstance(rank, int) and 0 <= rank < ranks, "rank", f"0 to {ranks - 1}", repr(rank)
        )
        require(isinstance(seed, int) and seed >= 0, "seed", "an integer >= 0", repr(seed))
        whole = isinstance(retain_steps, int) and retain_steps >= 1
        require(whole, "retain_steps", "an integer >= 1", repr(retain_steps))
        even = isinstance(batch_size, int) and batch_size >= 1 and batch_size % ranks == 0
        require(
            even,
            "batch_size",
            f"a multiple of world_size ({ranks})",
            repr(batch_size),
            "it counts the samples of all ranks together",
        )
        ours = {
            "batch_size",
            "batch_sampler",
            "sampler",
            "shuffle",
            "drop_last",
            "generator",
        } & loading.keys()
        require(
            not ours, "loading", "no setting of the order, which is the loader's own", sorted(ours)
        )
        sets = {"forget": forget, "retain": retain}
        for name, data in sets.items():
            sized = (
                hasattr(data, "__len__")
                and hasattr(data, "__getitem__")
                and not isinstance(data, IterableDataset)
            )
            require(sized, name, "a data set with a length, indexed by sample", type(data).__name__)
        samples = [len(data) for data in sets.values()]  # type: ignore[arg-type]
        require(
            samples[0] >= ranks,
            "forget",
            f"a sample for each of {ranks} ranks",
            f"{samples[0]} samples",
            "repeat all of it, ConcatDataset([forget] * n): adaptive weights stay in proportion",
        )
        require(
            samples[1] >= batch_size,
            "retain",
            f"at least batch_size ({batch_size}) samples",
            samples[1],
            "use a smaller batch_size",
        )
        self.retain_steps, self.position = retain_steps, 0
        self._run = {
            "seed": seed,
            "batch_size": batch_size,
            "retain_steps": retain_steps,
            "forget_samples": samples[0],
            "retain_samples": samples[1],
        }
        sizes = (min(batch_size, samples[0]), batch_size)
        self._shares = [
            _Shares(n, size, rank, ranks, (seed, stream))
            for stream, n, size in zip((FORGET, RETAIN), samples, sizes, strict=True)
        ]
        # with generators of their own: a new iterator takes no number from the global one
        self._loaders = [
            DataLoader(
                data, batch_sampler=shares, generator=_generator(*shares.key, rank), **loading
            )
            for data, shares in zip(sets.values(), self._shares, strict=True)
        ]
        self._batches: list[Iterator[Any]] = []

    def __len__(self) -> int:
        """Batches of an epoch, of both kinds."""
        return self._shares[FORGET].per_pass * (1 + self.retain_steps)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.position // len(self)

    def __iter__(self) -> Iterator[tuple[Phase, Any]]:
        epoch = self.epoch
        while self.epoch == epoch:
            cycle, done = divmod(self.position, 1 + self.retain_steps)
            if not self._batches:
                self._shares[FORGET].start = cycle + (done > 0)
                self._shares[RETAIN].start = cycle * self.retain_steps + max(0, done - 1)
                self._batches = [iter(loader) for loader in self._loaders]
            # an error while loading ends its iterator: the next one begins here
            batches, self._batches = self._batches, []
            batch = next(batches[FORGET if done == 0 else RETAIN])
            self._batches = batches
            self.position += 1  # before it is out: a state saved during its step goes on behind it
            yield "forget" if done == 0 else "retain", batch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, without loading what lies between; needed only to leave
        the order.
        """
        require(isinstance(epoch, int) and epoch >= 0, "epoch", "an integer >= 0", repr(epoch))
        self._go(epoch * len(self))

    def _go(self, position: int) -> None:
        if position != self.position:
            self.position, self._batches = position, []

    def state_dict(self) -> dict[str, int]:
        """The place behind the last batch given out, the same on every rank, and what it is a place
        in.
        """
        return {**self._run, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was saved; the number of ranks may be another.

        Raises:
            ValueError: it is a place in other data, or in another order.
        """
        theirs = {key: state.get(key) for key in self._run}
        require(
            theirs == self._run,
            "state",
            str(self._run),
            theirs,
            "resume with the data and settings of the run",
        )
        place: Any = state.get("position")
        require(isinstance(place, int) and place >= 0, "state", "a position >= 0", repr(place))
        self._go(place)
