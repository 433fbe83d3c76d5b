"""What the searches for tile sizes share: checked times of named candidates, printed with the fastest first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fvgen.bench.kernels import reason
from fvgen.bench.timing import time_calls
from fvgen.kernels._testing import as_tuple, largest_error

Call = Callable[[], Any]


def check(found: Any, expected: Any, allowed: float) -> None:
    """Compares the first outputs of a call, as many as are expected.

    Args:
        expected: a tensor or a tuple of them.
        allowed: largest error relative to the largest entry.

    Raises:
        ValueError: one of them is off by more, or has another shape.
    """
    for n, (f, e) in enumerate(zip(as_tuple(found), as_tuple(expected), strict=False)):
        if f.shape != e.shape:
            raise ValueError(f"output {n} has shape {list(f.shape)} instead of {list(e.shape)}")
        if not (error := largest_error(f, e)) <= allowed:
            raise ValueError(f"output {n} is off by {error:.1e} of the largest entry")


def repeats(call: Call) -> None:
    """Raises ValueError where two calls differ in a bit."""
    pairs = zip(as_tuple(call()), as_tuple(call()), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)):
        raise ValueError("two calls differ")


def checked_times(
    calls: Mapping[str, Call | Sequence[Call]],
    time: Callable[[Sequence[Call]], float],
    expected: Any = None,
    allowed: float | None = None,
) -> dict[str, float]:
    """Microseconds of each call that computes what it should; why another failed is printed, and does not end the run.

    Args:
        calls: name -> a call, or several on buffers of their own.
        time: microseconds of such calls.
        expected, allowed: see :func:`check`; None for calls that are not compared.
    """
    times = {}
    for name, call in calls.items():
        several = [call] if callable(call) else list(call)
        try:
            if allowed is not None:
                check(several[0](), expected, allowed)
            times[name] = time(several)
        except Exception as failure:  # a candidate that does not fit must not end the run
            print(f"{name}: {reason(failure)}", flush=True)
    return times


def cold(device: str, rounds: int = 10, seconds: float = 0.1) -> Callable[[Sequence[Call]], float]:
    """Times calls on buffers of their own in a CUDA graph, in microseconds."""

    def time(calls: Sequence[Call]) -> float:
        timing = time_calls(calls, device, rounds=rounds, graph=True, seconds=seconds)
        if device != "cpu" and timing.method != "cuda graph":
            print(f"the next is timed with {timing.method}")
        return 1e3 * timing.median_ms

    return time


def print_ranked(times: Mapping[str, float], rate: Callable[[float], str]) -> None:
    """One line each, the shortest first; ``rate`` says in words what so many microseconds mean."""
    for name, microseconds in sorted(times.items(), key=lambda item: item[1]):
        print(f"{microseconds:9.1f} us {rate(microseconds):>14}  {name}", flush=True)


def print_measured(lines: Sequence[str]) -> None:
    """The table as it goes into an operator's source; empty lines stand for shapes without a candidate."""
    print("\nMEASURED = {", *(line for line in lines if line), "}", sep="\n")
