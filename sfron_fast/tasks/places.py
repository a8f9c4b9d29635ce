"""Where a sample stands in a run: what its random draws depend on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..data.draws import sample_keys
from ..errors import require

Keys = Callable[[str], Tensor]  # of what is drawn, the samples' keys


class Places:
    """Counts the batches of each loader; a sample's keys say the seed, the loader, how many of its
    batches came before, and the sample's number in the batch of all ranks.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.estimates = False  # within ``estimating``
        self._positions: dict[str, int] = {}  # batches so far, by loader
        self._rank, self._ranks = 0, 1

    def take(self, name: str, count: int, ids: Tensor | None, device: torch.device) -> Keys:
        """The keys of the next batch of the loader called ``name``; ``ids`` number its samples in
        place of where they stand, ranks in turn.
        """
        phase = "fisher" if self.estimates else name
        position = self._positions.get(phase, 0)
        if count:  # an empty batch is skipped, perhaps on this rank alone
            self._positions[phase] = position + 1
        rows = torch.arange(count, device=device) * self._ranks + self._rank
        if ids is not None:
            rows = ids.to(device, torch.int64)
        return lambda what: sample_keys(rows, self.seed, phase, position, what)

    def begin(self, rank: int, ranks: int) -> None:
        """From the first batches on; ``rank`` of so many that share every batch."""
        self._positions, self._rank, self._ranks = {}, rank, ranks

    @contextmanager
    def estimating(self, rank: int, ranks: int) -> Iterator[None]:
        """Within, loaders share places of their own, from the first on."""
        kept = self.estimates, self._positions, self._rank, self._ranks
        self.estimates = True
        self.begin(rank, ranks)
        try:
            yield
        finally:
            self.estimates, self._positions, self._rank, self._ranks = kept

    def state_dict(self) -> dict[str, Any]:
        """How many batches have been taken, by loader."""
        return {"positions": dict(self._positions), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned.

        Raises:
            ValueError: it is of another seed.
        """
        require(state["seed"] == self.seed, "seed", state["seed"], self.seed, "use the run's")
        self._positions = dict(state["positions"])
