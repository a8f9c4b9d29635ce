"""A saliency mask on disk: a safetensors file whose header has shapes, provenance and checksums."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..errors import require
from ..files import write_whole

FORMAT = "sfron_fast.saliency_mask.v1"


def save_mask(mask: Any, path: str | os.PathLike[str]) -> None:
    """Write a ``SaliencyMask``, whole or not at all: uint8 tensors by name, and the header."""
    provenance = json.dumps(mask.metadata)
    header = {
        "format": FORMAT,
        "shapes": json.dumps(mask.shapes),
        "provenance": provenance,
        "digest": mask.digest(),
        "provenance_digest": _sha256(provenance),
    }
    # safetensors wants memory for each
    bits = {name: packed.cpu().clone() for name, packed in mask.items()}
    write_whole(Path(path), lambda temporary: save_file(bits, temporary, metadata=header))


def load_mask(path: str | os.PathLike[str], make: Callable[..., Any]) -> Any:
    """``make(bits, shapes, metadata)`` of what ``save_mask`` wrote; ``SaliencyMask.load`` says what
    is raised.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a mask file, found nothing at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        require(
            header.get("format") == FORMAT,
            "path",
            f"a mask in format {FORMAT}",
            header.get("format"),
        )
        shapes, provenance = json.loads(header["shapes"]), json.loads(header["provenance"])
        require(
            isinstance(provenance, dict), "provenance", "a JSON object", type(provenance).__name__
        )
        mask = make(bits, shapes, provenance)
        intact = (
            mask.digest() == header["digest"]
            and _sha256(header["provenance"]) == header["provenance_digest"]
        )
    except OSError:
        raise
    except Exception as error:
        # a header that somebody has made can have json, torch and safetensors raise anything
        raise ValueError(
            f"path: expected a whole mask file, found {path}: {error}; save the mask again"
        ) from error
    require(
        intact,
        "path",
        "a mask file as it was saved",
        f"{path}, which does not match its checksums",
        "save the mask again",
    )
    return mask


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
