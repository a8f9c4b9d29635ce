"""The first arm of a case: what the memory gives for the bytes that the work must move."""

import torch

from ..harness import Arm


def probe(moved: int, device: str) -> Arm:
    """What the memory gives for as many bytes, half read and half written."""
    return copy_probe(moved, device) if device == "cuda" else inplace_scale(moved)


def inplace_scale(moved: int) -> Arm:
    """An in-place scale: on a CPU a copy would also read what it overwrites."""
    buffer = torch.ones(max(moved // 8, 1))
    return Arm("probe: in-place scale", lambda: buffer.mul_(1.0))


CHUNK = 1 << 30  # bytes


def probe_bytes(moved: int) -> int:
    """What the copy holds on a GPU."""
    return 2 * min(max(moved // 2, 1), CHUNK)


def copy_probe(moved: int, device: str, chunk: int = CHUNK) -> Arm:
    """A copy, in chunks to save memory."""
    half = max(moved // 2, 1)
    source, target = (
        torch.ones(min(half, chunk), dtype=torch.uint8, device=device) for _ in range(2)
    )

    def run() -> None:
        for start in range(0, half, chunk):
            size = min(chunk, half - start)
            target[:size].copy_(source[:size])

    return Arm("probe: copy", run)
