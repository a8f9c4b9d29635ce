"""Fisher: a diagonal by parameter name, with how it was made; and on disk."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..distributed.shards import whole
from ..errors import require
from ..files import write_whole

FORMAT = "sfron_fast.fisher.v1"


class Fisher(dict[str, Tensor]):
    """Parameter name -> fp32 tensor of its shape, with ``metadata`` on how it was made."""

    def __init__(self, values: dict[str, Tensor], metadata: dict[str, Any] | None = None) -> None:
        super().__init__(values)
        self.metadata = metadata or {}

    def __repr__(self) -> str:
        known = ("estimator", "samples", "batches", "batch_size", "draws", "world_size")
        said = [f"{key} {self.metadata[key]}" for key in known if key in self.metadata]
        said.append(f"{len(self.metadata.get('no_gradient', ()))} without gradient")
        weights = sum(value.numel() for value in self.values())
        return f"<Fisher of {weights:,} weights in {len(self)} tensors: {', '.join(said)}>"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all: fp32 tensors by name, the metadata in the
        header. Of a sharded model every rank calls it, and the file is whole on each.
        """
        header = {"format": FORMAT, "metadata": json.dumps(self.metadata)}
        values = {name: whole(value).detach().cpu().clone() for name, value in self.items()}
        write_whole(Path(path), lambda temporary: save_file(values, temporary, metadata=header))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Fisher":
        """Read what ``save`` wrote, onto the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a Fisher's file, or not whole.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"path: expected a Fisher's file, found nothing at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header: Mapping[str, str] = file.metadata() or {}
                found = header.get("format")
                require(found == FORMAT, "path", f"a Fisher in format {FORMAT}", found)
                metadata = json.loads(header["metadata"])
                good = isinstance(metadata, dict)
                require(good, "metadata", "a JSON object", type(metadata).__name__)
                values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            right = all(value.dtype == torch.float32 for value in values.values())
            require(right, "path", "fp32 tensors", "others")
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"path: expected a whole file of a Fisher, found {path}: {error}; save it again"
            ) from error
        return cls(values, metadata)
