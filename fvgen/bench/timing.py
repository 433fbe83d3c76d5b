"""Times of calls: CUDA graphs or events on a GPU, the processor's clock without one."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

Call = Callable[[], Any]
MOST_COPIES = 512


@dataclass(frozen=True)
class Timing:
    """Time of one call in milliseconds.

    Attributes:
        median_ms, p10_ms, p90_ms, min_ms: over ``count`` readings.
        count: readings; one of a CUDA graph is the mean of the calls in it.
        method: "cuda graph", "cuda events" or "perf_counter".
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    count: int
    method: str

    @staticmethod
    def of(readings: Sequence[float], method: str) -> Timing:
        """Summary of at least one reading in milliseconds."""
        ordered = sorted(readings)
        deciles = statistics.quantiles(ordered, n=10, method="inclusive") if len(ordered) > 1 else ordered * 9
        return Timing(statistics.median(ordered), deciles[0], deciles[-1], ordered[0], len(ordered), method)

    def fields(self) -> dict[str, Any]:
        """The entries of a record."""
        return asdict(self)

    def seconds(self) -> dict[str, Any]:
        """The entries of a record in seconds."""
        return {n[:-3] + "_s" if n.endswith("_ms") else n: 1e-3 * v if n.endswith("_ms") else v for n, v in asdict(self).items()}


def cold_copies(args: tuple, device: str | torch.device, most: int = MOST_COPIES) -> list[tuple]:
    """The arguments and clones of them that together exceed twice the L2 cache, so that no call finds its input there.

    Args:
        args: of the call; tensors are cloned, the rest is shared.
        device: where they are.
        most: limit on the copies; two at least.

    Raises:
        ValueError: a floating-point input of zeros only, which would be faster to read and to multiply than real data.
    """
    tensors = [a for a in args if isinstance(a, Tensor) and a.numel()]
    for a in tensors:
        if a.is_floating_point() and a.numel() > 1 and not bool(a.any()):
            raise ValueError(f"an input of shape {list(a.shape)} holds only zeros; measure with real values")
    size = sum(a.numel() * a.element_size() for a in tensors)
    count = 2 if size == 0 else math.floor(2 * l2_bytes(device) / size) + 1
    clone = torch.clone
    return [args, *(tuple(clone(a) if isinstance(a, Tensor) else a for a in args) for _ in range(min(max(count, 2), most) - 1))]


def l2_bytes(device: str | torch.device) -> int:
    """Size of the GPU's L2 cache; 0 for the CPU."""
    device = torch.device(device)
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


def synchronize(device: str | torch.device) -> None:
    """Waits for the GPU's work, if there is a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    calls: Call | Sequence[Call],
    device: str | torch.device = "cpu",
    rounds: int = 30,
    graph: bool = False,
    seconds: float = 10.0,
) -> Timing:
    """Time of one call.

    Args:
        calls: what to time; of several, which do the same on buffers of their own, each reading takes the next or, in a graph,
            all of them.
        device: where they work.
        rounds: readings; fewer where they would take longer than ``seconds``, at least one.
        graph: replay a CUDA graph of one call per buffer, so that launching from Python does not count. Calls that cannot be
            captured are timed one by one with CUDA events, which the result's ``method`` says.
        seconds: about how long the readings may take.
    """
    calls = [calls] if callable(calls) else list(calls)
    cuda = torch.device(device).type == "cuda"
    for call in calls[:2]:  # compilation, allocation, choice of algorithms
        call()
    synchronize(device)
    start = time.perf_counter()
    calls[-1]()
    synchronize(device)
    once = max(time.perf_counter() - start, 1e-9)
    replay = _capture(calls) if cuda and graph else None
    per_reading = once * (len(calls) if replay else 1)
    rounds = max(1, min(rounds, int(seconds / per_reading)))
    if replay is not None:
        replay()
        return Timing.of([_event_ms(replay) / len(calls) for _ in range(rounds)], "cuda graph")
    if cuda:
        return Timing.of([_event_ms(calls[n % len(calls)]) for n in range(rounds)], "cuda events")
    return Timing.of([_clock_ms(calls[n % len(calls)]) for n in range(rounds)], "perf_counter")


def _capture(calls: Sequence[Call]) -> Call | None:
    """The replay of a graph of all calls, None where one of them cannot be captured."""
    if _synchronises(calls[0]):
        return None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose their algorithms per stream
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    recording = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    try:
        # the outer block puts the stream back where ending a spoilt capture raises too
        with torch.cuda.stream(torch.cuda.current_stream()), recording:
            # kept until all are captured: otherwise the outputs would share memory and stay in the cache
            outputs = [call() for call in calls]
    except RuntimeError:  # a synchronisation that PyTorch does not know of, or too little memory for all outputs at once
        # Some versions of PyTorch leave the pool open, after which every later capture fails.
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch.cuda.synchronize()
        return None
    kept = (graph, outputs)
    return lambda: kept[0].replay()


def _synchronises(call: Call) -> bool:
    """Whether a call waits for the GPU, for example to read a size: such a call cannot be captured."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return False


def _event_ms(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _clock_ms(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def time_once(call: Call, device: str | torch.device) -> float:
    """Milliseconds of one call by the processor's clock, from an idle GPU until it is idle again."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


@contextmanager
def kernels_in(mode: str) -> Iterator[None]:
    """Operators run in a mode of FVGEN_KERNELS inside the block."""
    with patch.dict("os.environ", {"FVGEN_KERNELS": mode}):
        yield


def strict_kernels() -> AbstractContextManager[None]:
    """Operators on CUDA tensors raise instead of falling back to their reference inside the block."""
    return kernels_in("strict")


@contextmanager
def inference() -> Iterator[None]:
    """As the pipeline runs a model, and strict about operators. No generator may yield inside: its caller would be in it too."""
    with strict_kernels(), torch.inference_mode():
        yield
