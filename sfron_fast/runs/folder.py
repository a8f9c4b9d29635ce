"""The folder of a run of ``unlearn``: its mask, and the checkpoint it goes on from."""

import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import require
from ..files import remove_leftovers, write_whole
from ..saliency.mask import SaliencyMask
from .recipe import Recipe

CHECKPOINT = "checkpoint.pt"
MASK = "mask.safetensors"
FORMAT = 2  # of the checkpoint; 1 had no number
SHARED_FORMAT = 3  # of several ranks': its tensors are in a folder of their own


class RunFolder:
    """Where one run is saved; reading it refuses what another run, or an older version, has
    written.
    """

    def __init__(self, path: Path) -> None:
        free = not path.exists() or path.is_dir()
        require(free, "checkpoint", "a folder, or nothing there yet", f"a file at {path}")
        self.path, self.checkpoint, self.mask = path, path / CHECKPOINT, path / MASK

    def open(self, mask: SaliencyMask) -> None:
        """Make the folder and save the mask in it; nothing else in it is overwritten."""
        remove_leftovers(self.mask)
        remove_leftovers(self.checkpoint)
        if self.checkpoint.exists():
            return
        theirs = self.mask.exists() and SaliencyMask.load(self.mask) != mask
        require(
            not theirs,
            "checkpoint",
            f"no other mask at {self.mask}",
            "one",
            "use another folder, or remove it",
        )
        mask.save(self.mask)

    def read(self, recipe: Recipe, start: str, device: torch.device) -> dict[str, Any] | None:
        """The checkpoint, or None if there is none; ``start`` is the digest of the weights that it
        began with.
        """
        if not self.checkpoint.exists():
            return None
        try:
            saved = torch.load(self.checkpoint, weights_only=True, map_location=device)
            theirs, version = saved["recipe"], saved.get("format", 1)
        except Exception as error:
            raise ValueError(
                f"checkpoint: expected a checkpoint of unlearn, found {self.checkpoint}: {error!r};"
                " remove it to start again"
            ) from error
        require(
            version in (FORMAT, SHARED_FORMAT),
            "checkpoint",
            f"format {FORMAT}",
            version,
            "finish the run with the version that began it, or start again in another folder",
        )
        # checkpoints from before a setting; of zero_over_zero the mask, all that it decides, is in
        # the folder
        earlier = {
            "zero_over_zero": recipe.zero_over_zero,
            "ceiling": None,
            "ceiling_of": "sample",
            "reference_loss": None,
            "draws": 1,
            "objective": "ascent",
            "clip_retain": False,
            "state_dtype": None,
            "weight_bits": None,
            "slow_device": None,
        }
        same = {**earlier, **theirs} == asdict(recipe)
        require(
            same,
            "checkpoint",
            f"a run with this recipe ({recipe.name})",
            "another recipe's",
            "use another folder, or the recipe the run began with",
        )
        require(
            saved["start"] == start,
            "model",
            "the weights the checkpointed run started from",
            "other weights",
            "load the original model first",
        )
        return saved


def save_whole(state: dict[str, Any], path: Path) -> None:
    """torch.save that leaves the previous file whole if the process dies while writing, or if
    nobody could read it.

    Raises:
        ValueError: a value that ``torch.load(weights_only=True)`` refuses; found before anything is
            written.
    """
    check_readable(state)

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(state, file)

    write_whole(path, fill)


def check_readable(state: dict[str, Any]) -> None:
    """Raise ValueError, with the place and the type, if ``state`` holds what a checkpoint cannot
    give back.
    """
    if not _reads(_outline(state)):
        place, value = _culprit(state)
        require(
            False,
            "checkpoint",
            "values that torch.load(weights_only=True) reads (tensors, numbers, text, lists, "
            "dicts)",
            f"{type(value).__module__}.{type(value).__qualname__} at {place}",
            "turn it into one of those, for example in get_extra_state of the module",
        )


def _outline(value: Any) -> Any:
    """The same without the tensors' numbers."""
    if type(value) in (Tensor, torch.nn.Parameter):
        return torch.empty(0)
    if type(value) is dict:
        return {_outline(key): _outline(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_outline, value))
    return value


def _reads(outline: Any) -> bool:
    memory = io.BytesIO()
    try:
        torch.save(outline, memory)
        memory.seek(0)
        torch.load(memory, weights_only=True)
    except OSError:
        raise
    except Exception:
        return False
    return True


def _culprit(value: Any, place: str = "the run's state") -> tuple[str, Any]:
    """The innermost value that is refused."""
    inside: list[Any] = []
    if isinstance(value, dict):
        inside = [(f"{place}, key {key!r}", key) for key in value]
        inside += [(f"{place}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        inside = [(f"{place}[{i}]", item) for i, item in enumerate(value)]
    for where, item in inside:
        if not _reads(_outline(item)):
            return _culprit(item, where)
    return place, value
