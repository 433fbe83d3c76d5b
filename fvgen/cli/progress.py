"""Stages of a run on stderr: bars on a terminal, otherwise one line each."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

_DELAY = 1.0  # shorter stages show no bar


class Stages:
    """Progress callback of the pipeline: called with (stage, fraction), 0 at its beginning and 1 at its end."""

    def __init__(self) -> None:
        self._stage = ""
        self._start = 0.0
        self._bar: Any = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._close()

    def __call__(self, stage: str, fraction: float) -> None:
        if stage != self._stage:
            if fraction >= 1.0:  # a stage that is over already
                return
            self._open(stage)
        if self._bar is not None:
            self._bar.update(min(fraction, 1.0) - self._bar.n)
        if fraction >= 1.0:
            if self._bar is None:
                print(f"{stage:<9} {time.perf_counter() - self._start:6.2f} s", file=sys.stderr)
            self._close()

    def _open(self, stage: str) -> None:
        self._close()
        self._stage, self._start = stage, time.perf_counter()
        if sys.stderr.isatty():
            from tqdm import tqdm

            layout = "{desc:<9} {percentage:3.0f}% |{bar:40}| {elapsed}"
            self._bar = tqdm(total=1.0, desc=stage, delay=_DELAY, bar_format=layout, file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""
