"""Batches kept out of training, to judge it by: taken from a loader before a run."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from ..errors import require

SHARE = 0.1  # of the samples, or batches, at most
SAMPLES = 64


def keep_out(loader: Iterable[Any], name: str) -> tuple[Iterable[Any], list[Any]]:
    """(the rest, kept): a tenth of the samples of ``loader``, at most 64, that the rest lacks.

    Of a list of batches its last ones are kept; of a DataLoader over a data set with a length,
    evenly spaced samples, and the rest is loaded as before: batch size, order, workers, collate.
    With a DistributedSampler the ranks share what one process would keep.

    Raises:
        ValueError: another kind of loader, or too few batches to spare one.
    """
    if isinstance(loader, (list, tuple)):
        count = max(1, int(SHARE * len(loader)))
        require(len(loader) > 1, name, "at least two batches, one to be kept out", len(loader))
        return loader[:-count], list(loader[-count:])
    remedy = "pass a list of batches, or such a DataLoader"
    found = type(loader).__name__
    require(plain(loader), name, "a list, or a DataLoader with its own sampler", found, remedy)
    source: Any = loader
    dataset = source.dataset
    total = len(dataset)
    count = min(SAMPLES, int(SHARE * total))
    require(count > 0, name, f"at least {round(1 / SHARE)} samples", total, remedy)
    chosen = evenly(total, count)
    left = sorted(set(range(total)) - set(chosen))
    settings = {
        key: getattr(source, key)
        for key in (
            "batch_size",
            "num_workers",
            "collate_fn",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "multiprocessing_context",
            "generator",
            "prefetch_factor",
            "persistent_workers",
        )
    }
    shuffle = isinstance(source.sampler, RandomSampler)
    generator = source.sampler.generator if shuffle else None
    rest_set = Subset(dataset, left)
    sampler: Any = None
    if shuffle:
        sampler = RandomSampler(left, generator=generator)
    elif isinstance(source.sampler, DistributedSampler):
        ranks = source.sampler
        sampler = DistributedSampler(
            rest_set,
            ranks.num_replicas,
            ranks.rank,
            shuffle=ranks.shuffle,
            seed=ranks.seed,
            drop_last=ranks.drop_last,
        )
    rest = DataLoader(rest_set, sampler=sampler, drop_last=source.drop_last, **settings)
    return rest, list(_once(source, chosen))


def can_keep_out(loader: Iterable[Any]) -> bool:
    """Whether ``keep_out`` would take this loader."""
    if isinstance(loader, (list, tuple)):
        return len(loader) > 1
    return plain(loader) and int(SHARE * len(getattr(loader, "dataset", ()))) > 0


def some_of(loader: Iterable[Any], count: int) -> Iterator[Any]:
    """Batches of about ``count`` samples to look at, which stay in the loader: evenly spaced ones
    of a DataLoader's data set, the same each time; else batches of a pass, for the caller to stop.
    """
    if not plain(loader):
        return iter(loader)
    source: Any = loader
    total = len(source.dataset)
    return iter(_once(source, evenly(total, min(count, total))))


def plain(loader: Any) -> bool:
    """Whether it is a DataLoader over all of a data set, each sample once."""
    return (
        isinstance(loader, DataLoader)
        and loader.batch_size is not None
        and isinstance(loader.sampler, (RandomSampler, SequentialSampler, DistributedSampler))
        and not getattr(loader.sampler, "replacement", False)
        and getattr(loader.sampler, "_num_samples", None) is None
    )


def evenly(total: int, count: int) -> list[int]:
    """``count`` of the numbers below ``total``, evenly spaced."""
    return torch.linspace(0, total - 1, count).round().long().tolist()


def _once(source: Any, chosen: list[int]) -> DataLoader[Any]:
    """One pass over the chosen samples, in this process; of a DistributedSampler's rank its share
    of them.
    """
    if isinstance(source.sampler, DistributedSampler):
        chosen = chosen[source.sampler.rank :: source.sampler.num_replicas]
    kept = Subset(source.dataset, chosen)
    return DataLoader(kept, batch_size=source.batch_size, collate_fn=source.collate_fn)
