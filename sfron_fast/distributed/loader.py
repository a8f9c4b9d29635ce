"""The loaders of several ranks, drawn together for ever: a global batch is what all of them give at
one time.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from ..data.endless import EndlessLoader
from ..errors import require
from .ranks import Ranks


class SharedLoader(EndlessLoader):
    """A pass ends when no rank has another batch. A rank whose loader ends earlier, or whose batch
    is empty, gets its last batch with samples again, which then does not count (``here``): torch's
    engines wait for every rank.
    """

    def __init__(self, loader: Iterable[Any], name: str, ranks: Ranks) -> None:
        super().__init__(loader, name)
        self.ranks = ranks
        self._over = False  # this rank's loader has no more in this pass
        self._last: Any = None  # its last batch with samples in this pass, and that one's number
        self._number = self._wanted = 0

    def batch(self, task: Any, device: torch.device) -> Any:
        """This rank's part of the next global batch that has samples, prepared.

        Raises:
            ValueError: a whole pass has none, the first of a pass has none for some rank, or
                another rank has refused its own.
        """
        last = self.passes + 1
        while True:
            batch, samples, drawn, error = None, 0, None, None
            try:
                drawn = self._draw()
                if drawn is not None:
                    self.drawn += 1
                    batch = task.prepare(drawn, device, self.name)
                    samples = task.samples(batch)
            except Exception as problem:
                error = problem
            if samples:
                self._last, self._number = drawn, self.drawn
            has = self._last is not None
            found = self.ranks.exchange(error, drawn is not None, samples, has)
            if not any(there for there, _, _ in found):
                empty = "at least one sample", "a pass of empty batches"
                require(self.passes < last, self.name, *empty)
                self._begin()
                continue
            counts = [count for _, count, _ in found]
            if not any(counts):
                continue
            first = "a sample for every rank in the first batch of a pass"
            require(all(has for _, _, has in found), self.name, first, counts)
            self.here = samples > 0
            return batch if self.here else task.prepare(self._last, device, self.name)

    def _draw(self) -> Any:
        if self._over:
            return None
        kept = self._before, self._marks
        batch = super()._draw()
        if batch is None:  # the place stays behind the last batch
            self._over = True
            self._before, self._marks = kept
        return batch

    def _begin(self) -> None:
        for sampler in self._samplers():
            sampler.set_epoch(self.passes)
        super()._begin()
        self._over, self._last, self._number = False, None, 0

    def _samplers(self) -> list[DistributedSampler[Any]]:
        """Those that must be told which pass it is, or all of them have one order."""
        own = getattr(self.loader, "sampler", None)
        inner = getattr(getattr(self.loader, "batch_sampler", None), "sampler", None)
        return [s for s in dict.fromkeys((own, inner)) if isinstance(s, DistributedSampler)]

    def state_dict(self) -> dict[str, Any]:
        """As of one process, and which batch would stand in."""
        return {**super().state_dict(), "stand_in": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Find the place again; the caller puts the global generators back afterwards."""
        self._wanted = state.get("stand_in", state["drawn"])
        super().load_state_dict(state)
        self._number = self._wanted

    def _seen(self, batch: Any, number: int) -> None:
        if number == self._wanted:
            self._last = batch
