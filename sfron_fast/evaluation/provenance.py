"""What a report was made with."""

import platform
import time
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("sfron-fast", "torch", "numpy", "scikit-learn", "matplotlib")


def provenance(seeds: list[int]) -> dict[str, Any]:
    """Versions, machine, time and seeds, for the reader of a report."""
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    )
    return {
        "versions": (
            {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
        ),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seeds": seeds,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
