"""The best state of a run that has been evaluated: kept, and put back where the run stops."""

from pathlib import Path
from typing import Any

import torch

from ..errors import require
from ..files import remove_leftovers
from ..models.buffers import fit_buffers
from .folder import save_whole
from .shards import bare

BEST = "best.pt"  # in a run's folder


def better(entry: dict[str, float], than: dict[str, float] | None, floor: float) -> bool:
    """Of two evaluations the one with the forget accuracy nearer to the floor; one below the floor
    has forgotten too much, and is better than none alone.
    """

    def distance(found: dict[str, float]) -> tuple[bool, float]:
        accuracy = found["forget_accuracy"]
        return accuracy < floor, abs(accuracy - floor)

    return than is None or distance(entry) < distance(than)


class Best:
    """The weights and buffers of the best evaluation so far, in ``path``, or in the host's memory
    without one.
    """

    def __init__(self, run: Any, path: Path | None) -> None:
        sharded = run.ranks.sharded
        remedy = "the run's checkpoint has the state of a sharded model"
        require(path is None or not sharded, "best", "None, for a sharded model", path, remedy)
        self.run, self.path = run, path
        self.entry: dict[str, float] | None = None
        self.state: dict[str, Any] | None = None
        if path is None:
            return
        if run.ranks.rank == 0:
            remove_leftovers(path)
        if run.position and path.exists():  # of this run, before it was stopped
            saved = self._read()
            self.entry = saved["entry"] if saved["entry"] in run.result.history else None

    def consider(self, entry: dict[str, float], floor: float) -> None:
        """Keep the model as it is, if this evaluation of it is the best."""
        if not better(entry, self.entry, floor):
            return
        self.entry, model = dict(entry), bare(self.run).state_dict()
        if self.path is None:
            self.state = {n: v.detach().clone().cpu() for n, v in model.items()}
        elif self.run.ranks.rank == 0:
            save_whole({"entry": self.entry, "model": model}, self.path)

    def restore(self) -> dict[str, float] | None:
        """Put it back; the evaluation it is of, or None where there is none."""
        if self.entry is None:
            return None
        with self.run.ranks.together():
            state = self.state if self.path is None else self._read()["model"]
            assert state is not None
        model = bare(self.run)
        fit_buffers(model, state, persistent=True)
        model.load_state_dict(state)
        return self.entry

    def _read(self) -> dict[str, Any]:
        assert self.path is not None
        try:
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            return {"entry": saved["entry"], "model": saved["model"]}
        except Exception as error:
            raise ValueError(
                f"best: expected a file that unlearn has written, found {self.path}: {error!r};"
                " give another path, or remove it"
            ) from error
