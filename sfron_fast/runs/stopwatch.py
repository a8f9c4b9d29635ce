"""Wall time of a run, less what does not count."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Wall time of a `with` block in seconds, without what runs under `pause()`; a second `with`
    adds to it.

    Waits for queued CUDA work on `device` (None: the current one) before each look at the clock.
    """

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        self._device = device
        self._total = 0.0
        self._start: float | None = None

    def _now(self) -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._total + (self._now() - self._start if self._start is not None else 0.0)

    def __enter__(self) -> Stopwatch:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self._total, self._start = self.seconds, None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count this block; in another pause, or outside the `with`, it changes nothing."""
        running = self._start is not None
        self._total, self._start = self.seconds, None
        try:
            yield
        finally:
            if running:
                self._start = self._now()
