"""Prepares the next batches in a thread of its own, on a CUDA stream of its own."""

from __future__ import annotations

import contextlib
import ctypes
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from fvgen.distill.data import batch_tensors
from fvgen.distill.graphs import RECORDING
from fvgen.distill.networks import Batch

PATIENCE_S = 2.0


class _Unwanted(SystemExit):  # of which a thread says nothing when it ends
    """Ends the thread between two of its instructions."""


class Prefetcher:
    """``read(first)``, ``read(first + 1)``, ... in this order, ``depth`` of them ahead.

    Args:
        read: makes a batch; called in the thread only.
        first: its first argument.
        device: of the batches.
        depth: batches that wait to be fetched.
    """

    def __init__(self, read: Callable[[int], Batch], first: int, device: torch.device, depth: int = 2) -> None:
        self._read, self._device = read, device
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(first,), name="fvgen-data", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        """The next batch; an error of the thread is raised here."""
        found = self._queue.get()
        if isinstance(found, BaseException):
            raise found
        batch, ready = found
        if ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(ready)
            for x in batch_tensors(batch):
                x.record_stream(stream)  # its memory may be reused only once this stream is past it
        return batch

    def close(self, hurry: bool = False) -> None:
        """Ends the thread, once the batch that it is making is made.

        Args:
            hurry: where the run ends too: break off that batch, and leave the thread behind (it is a daemon) if that takes longer
                than ``PATIENCE_S``.
        """
        self._closed.set()
        number, told, begun = self._thread.ident, False, time.monotonic()
        if hurry and self._thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(number), ctypes.py_object(_Unwanted))
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)
            if not told and time.monotonic() - begun > PATIENCE_S:
                told = True
                what = "it is left behind" if hurry else "waiting for it"
                print(f"fvgen: the thread that makes the clips is still at work on some; {what}", file=sys.stderr)
                if hurry:
                    return

    def _work(self, number: int) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
                stream = torch.cuda.Stream(self._device)
            while not self._closed.is_set():
                with RECORDING:
                    if self._device.type == "cuda":
                        with torch.cuda.stream(stream):
                            found = self._read(number), stream.record_event()
                    else:
                        found = self._read(number), None
                self._queue.put(found)
                number += 1
        except _Unwanted:
            pass
        except BaseException as error:
            self._queue.put(error)
