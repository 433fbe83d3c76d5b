"""The two ceilings of the roofline, measured on the GPU at hand instead of taken from a data sheet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fvgen.bench.timing import Timing, time_calls


def copy_bandwidth(device: str, size_bytes: int | None = None, rounds: int = 20) -> tuple[float, Timing]:
    """Bytes per second of the fastest copy within device memory, read and written bytes together; and that copy's time.

    Kernels are to be compared with what a kernel can reach. A plain ``copy_`` recorded in a CUDA graph becomes a memcpy node,
    which on an H200 had two thirds of a copying kernel's rate: a ceiling that kernels exceed. So elementwise kernels that read
    and write every element once are timed as well, with CUDA events and without a graph, and the fastest counts.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        size_bytes: of the buffer that is copied; None takes 1 GiB on a GPU, 64 MiB otherwise.
        rounds: readings.
    """
    cuda = device.startswith("cuda")
    size = size_bytes or (2**30 if cuda else 2**26)
    source = torch.randint(1, 2**31, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    copies: tuple[Callable[[], Any], ...] = (
        lambda: torch.add(source, 0, out=target),
        lambda: torch.neg(source, out=target),
        lambda: torch.neg(source.view(torch.float32), out=target.view(torch.float32)),
        lambda: target.copy_(source),
    )
    timing = min((time_calls(copy, device, rounds) for copy in copies), key=lambda t: t.median_ms)
    return 2 * source.numel() * 4 / (1e-3 * timing.median_ms), timing


def matmul_rate(device: str, size: int | None = None, rounds: int = 20) -> tuple[float, Timing]:
    """Floating point operations per second of a square bfloat16 product by PyTorch's library (float32 on the CPU)."""
    cuda = device.startswith("cuda")
    n = size or (8192 if cuda else 512)
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if cuda else torch.float32).unbind(0)
    out = torch.empty_like(a)
    timing = time_calls(lambda: torch.mm(a, b, out=out), device, rounds, graph=True)
    return 2 * n**3 / (1e-3 * timing.median_ms), timing
