"""Stop anywhere and go on bit-identically: random generators, the place in each loader, whole-or-nothing files."""

import random
from collections.abc import Iterable
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checks import require
from .files import write_whole


def random_state() -> dict[str, Any]:
    """The state of every global generator a data pipeline may use, in types ``weights_only`` loading accepts."""
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = legacy
    version, internal, next_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": [version, list(internal), next_gauss],
        "numpy": [str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, next_gauss = state["python"]
    random.setstate((version, tuple(internal), next_gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


class EndlessLoader:
    """Batches for ever, pass after pass, with a place that can be saved and found again.

    A pass's order depends on the generators when it began; to find a place, put those back, begin the pass
    again and drop the batches already drawn.
    """

    def __init__(self, loader: Iterable[Any], name: str) -> None:
        empty = length_hint(loader, 1) == 0
        require(not empty, name, "at least one batch", "an empty loader", "check the split and drop_last")
        self.loader, self.name = loader, name
        self.begun: dict[str, Any] | None = None
        self.drawn = 0
        self._iterator: Any = iter(())

    def next(self) -> Any:
        """The next batch; raises ValueError if a whole pass has none."""
        batch = next(self._iterator, None)
        if batch is None:
            self._begin()
            batch = next(self._iterator, None)
            require(batch is not None, self.name, "at least one batch", "an empty loader",
                    "check the split and drop_last")  # fmt: skip
        self.drawn += 1
        return batch

    def _begin(self) -> None:
        self.begun = {"global": random_state(), "own": self.own_state()}
        self.drawn = 0
        self._iterator = iter(self.loader)

    def _generators(self) -> list[torch.Generator]:
        sampler, batches = getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None)
        owners = (self.loader, sampler, batches, getattr(batches, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return [g for g in found if isinstance(g, torch.Generator)]

    def own_state(self) -> list[torch.Tensor]:
        """The generators the loader and its sampler hold themselves."""
        return [g.get_state() for g in self._generators()]

    def set_own_state(self, states: list[torch.Tensor]) -> None:
        """Put back what ``own_state`` returned."""
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        """The place, and what finds it again."""
        return {"begun": self.begun, "drawn": self.drawn, "own": self.own_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Find the place again; the caller puts the global generators back afterwards."""
        same = len(state["own"]) == len(self._generators())
        require(same, self.name, f"{len(state['own'])} generators of its own, as the run began with",
                len(self._generators()))  # fmt: skip
        if state["begun"] is not None:
            set_random_state(state["begun"]["global"])
            self.set_own_state(state["begun"]["own"])
            self._begin()
            for _ in range(state["drawn"]):
                require(next(self._iterator, None) is not None, self.name, f"at least {state['drawn']} batches a pass",
                        "fewer", "resume with the data the run began with")  # fmt: skip
            self.begun, self.drawn = state["begun"], state["drawn"]
        self.set_own_state(state["own"])  # the Fisher passes moved it even where no pass has begun


def save_whole(state: dict[str, Any], path: Path) -> None:
    """torch.save that leaves the previous file whole if the process dies while writing."""

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(state, file)

    write_whole(path, fill)
