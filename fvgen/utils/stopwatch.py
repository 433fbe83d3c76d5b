"""Seconds per stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, float], None]


class Stopwatch:
    """Seconds per stage, with the GPU's work finished before each reading; tells ``progress`` what begins.

    Args:
        device: where the stages work.
        progress: called with (stage, fraction in [0, 1]).
    """

    def __init__(self, device: torch.device, progress: Progress | None) -> None:
        self.timings: dict[str, float] = {}
        self._device, self._progress = device, progress

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Times the block; yields a function that reports progress within it."""
        report = self._progress or (lambda _stage, _fraction: None)
        report(name, 0.0)
        start = time.perf_counter()
        yield lambda _what, fraction: report(name, fraction)
        if self._device.type == "cuda":
            import torch

            torch.cuda.synchronize(self._device)
        self.timings[name] = round(time.perf_counter() - start, 6)
        report(name, 1.0)
