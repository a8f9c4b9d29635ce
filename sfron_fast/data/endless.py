"""Stop anywhere and go on bit-identically: the random generators, and the place in each loader."""

import copy
import hashlib
import random
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..errors import require
from .batches import check_again, tensors_in
from .sampler_state import sampler_state, set_sampler_state

SAMPLED = 4096  # elements of a tensor that tell batches apart


def _generators() -> tuple[Any, ...]:
    """The state of every global generator a data pipeline may use, as the libraries give it."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(legacy=True)


def _portable(state: tuple[Any, ...]) -> dict[str, Any]:
    """The same in types that ``weights_only`` loading accepts."""
    torchs, cuda, (version, internal, next_gauss), (kind, keys, position, has_gauss, gauss) = state
    return {
        "torch": torchs,
        "cuda": cuda,
        "python": [version, list(internal), next_gauss],
        "numpy": [
            str(kind),
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
    }


def random_state() -> dict[str, Any]:
    """The state of every global generator a data pipeline may use, in types ``weights_only``
    loading accepts.
    """
    return _portable(_generators())


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

    A pass's order depends on the generators when it began; to find a place, put those back, begin
    the pass again and drop the batches already drawn. The last of them must be the one drawn then.

    Passes are its own: others may read ``loader`` meanwhile, also one whose persistent workers
    serve one pass at a time, for which this holds workers of its own.
    """

    here = True  # whether the last batch counts; of ranks that share batches one may have none

    def __init__(self, loader: Iterable[Any], name: str) -> None:
        check_again(loader, name)
        empty = length_hint(loader, 1) == 0
        require(
            not empty,
            name,
            "at least one batch",
            "an empty loader",
            "check the split and drop_last",
        )
        self.loader, self.name = loader, name
        self.persistent = isinstance(loader, DataLoader) and loader.persistent_workers
        self._source: Any = loader
        if self.persistent:
            self._source = copy.copy(loader)  # the same data set and sampler
            self._source._iterator = None
        self.begun: dict[str, Any] | None = None
        self.drawn = self.passes = 0
        self._iterator: Any = iter(())
        self._lent: Any = None
        self._before: tuple[Any, ...] = ()  # the generators before the last batch
        self._marks: list[Tensor] = []

    def next(self) -> Any:
        """The next batch; raises ValueError if a whole pass has none."""
        batch = self._draw()
        if batch is None:
            self._begin()
            batch = self._draw()
            require(
                batch is not None,
                self.name,
                "at least one batch",
                "an empty loader",
                "check the split and drop_last",
            )
        self.drawn += 1
        return batch

    def batch(self, task: Any, device: torch.device) -> Any:
        """The next batch that has samples, prepared by the task (``tasks.Task``) for ``device``.

        Raises:
            ValueError: a whole pass has none.
        """
        last = self.passes + 1
        while True:
            batch = task.prepare(self.next(), device, self.name)
            if task.samples(batch):
                return batch
            require(
                self.passes <= last, self.name, "at least one sample", "a pass of empty batches"
            )

    def aside(self) -> Iterator[Any]:
        """A pass for somebody else, for example an evaluation, which leaves the open one alone."""
        self._lent = self._another(self.loader, self._iterator)
        return self._lent

    def _another(self, loader: Any, known: Any) -> Any:
        iterator = iter(loader)
        require(
            iterator is not known,
            self.name,
            "a new iterator at every iter()",
            "the one in use elsewhere",
            "evaluations read the loader between steps: let __iter__ begin a pass of its own",
        )
        return iterator

    def _draw(self) -> Any:
        self._before = _generators()
        batch = next(self._iterator, None)
        self._marks = (
            [] if batch is None else [_mark(t) for t in tensors_in(batch) if isinstance(t, Tensor)]
        )
        return batch

    def _begin(self) -> None:
        self.begun = {"global": random_state(), "own": self.own_state()}
        self.drawn, self.passes = 0, self.passes + 1
        self._iterator = self._another(self._source, self._lent)

    def _seen(self, batch: Any, number: int) -> None:
        """Batch 1, 2, ... of a pass, drawn again to find the place."""

    def own_state(self) -> dict[str, Any]:
        """What the loader and its samplers keep themselves: generators, counters, orders."""
        return sampler_state(self.loader)

    def set_own_state(self, state: dict[str, Any]) -> None:
        """Put back what ``own_state`` returned."""
        set_sampler_state(self.loader, state, self.name)

    def check_resumable(self) -> None:
        """Raise ValueError if no checkpoint could find the place again."""
        require(
            not self.persistent,
            self.name,
            "persistent_workers=False in a run with checkpoints",
            "True",
            "what such workers' generators have drawn in earlier passes cannot be put back",
        )

    def state_dict(self) -> dict[str, Any]:
        """The place, and what finds it again."""
        self.check_resumable()
        before = _portable(self._before) if self._before else None
        return {
            "begun": self.begun,
            "drawn": self.drawn,
            "passes": self.passes,
            "own": self.own_state(),
            "before": before,
            "marks": _digest(self._marks),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Find the place again; the caller puts the global generators back afterwards."""
        self.check_resumable()
        if state["begun"] is not None:
            set_random_state(state["begun"]["global"])
            self.set_own_state(state["begun"]["own"])
            self.passes = state["passes"] - 1
            self._begin()
            for left in range(state["drawn"], 0, -1):
                if left == 1:
                    # what it draws in loading samples, it draws again
                    set_random_state(state["before"])
                found = next(self._iterator, None) if left > 1 else self._draw()
                require(
                    found is not None,
                    self.name,
                    f"at least {state['drawn']} batches a pass",
                    "fewer",
                    "resume with the data the run began with",
                )
                self._seen(found, state["drawn"] - left + 1)
            require(
                _digest(self._marks) == state["marks"],
                self.name,
                "the batches of the checkpointed run",
                "others",
                "resume with its data, in an order that comes from torch's, numpy's or Python's"
                " generators: global ones, or attributes of the loader or its sampler",
            )
            self.begun, self.drawn, self.passes = state["begun"], state["drawn"], state["passes"]
        self.set_own_state(state["own"])  # the Fisher passes moved it even where no pass has begun


def _mark(tensor: Tensor) -> Tensor:
    """Some elements of a tensor, copied where it lies: they wait for no device."""
    if tensor.layout != torch.strided:
        return tensor.new_empty(0, layout=torch.strided)
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLED)].clone()


def _digest(marks: list[Tensor]) -> str:
    sha = hashlib.sha256()
    for mark in marks:
        sha.update(f"{mark.dtype}{list(mark.shape)}".encode())
        sha.update(mark.cpu().view(torch.uint8).numpy().tobytes() if mark.numel() else b"")
    return sha.hexdigest()
