"""Times ways to cut up the product at the network's shapes: ``python -m benchmarks.tune_temporal_conv`` on a GPU with TMA."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.tuning import checked_times, cold, print_measured, print_ranked
from fvgen.bench.kernels import reason
from fvgen.bench.timing import cold_copies
from fvgen.kernels._spec import Case
from fvgen.kernels.temporal_conv import reference
from fvgen.kernels.temporal_conv.spec import FORWARD
from fvgen.kernels.temporal_conv.triton import Tiles, descriptors_fit, with_descriptors

# rows, channels, extra channels, depth, warps, stages, persistent programs per multiprocessor, rows of tiles in a group
CANDIDATES = tuple(
    Tiles(*numbers)
    for numbers in (
        (64, 64, 0, 64, 4, 4),
        (64, 64, 0, 128, 4, 3),
        (64, 128, 0, 64, 4, 3),
        (64, 128, 0, 64, 4, 4),
        (64, 128, 32, 64, 4, 3),
        (64, 128, 32, 64, 4, 4),
        (64, 256, 0, 64, 4, 2),
        (64, 256, 64, 64, 4, 2),
        (128, 64, 0, 64, 4, 3),
        (128, 64, 0, 64, 4, 4),
        (128, 64, 0, 64, 4, 3, 2),
        (128, 128, 0, 64, 4, 3),
        (128, 128, 0, 64, 8, 3),
        (128, 128, 0, 64, 8, 3, 0, 16),
        (128, 128, 0, 64, 8, 4),
        (128, 128, 0, 64, 8, 4, 1),
        (128, 128, 0, 128, 8, 2),
        (128, 128, 32, 64, 4, 3),
        (128, 128, 32, 64, 8, 3),
        (128, 128, 32, 64, 8, 3, 0, 4),
        (128, 128, 32, 64, 8, 3, 0, 16),
        (128, 128, 32, 64, 8, 4),
        (128, 128, 32, 64, 8, 4, 1),
        (128, 128, 32, 32, 8, 5),
        (128, 256, 0, 64, 8, 3),
        (128, 256, 0, 64, 8, 4),
        (128, 256, 0, 64, 8, 3, 1),
        (128, 256, 64, 64, 8, 3),
        (128, 256, 64, 64, 8, 4),
        (256, 64, 0, 64, 8, 3),
        (256, 128, 0, 64, 8, 3),
        (256, 128, 0, 64, 8, 4),
        (256, 128, 0, 64, 8, 3, 1),
        (256, 128, 32, 64, 8, 3),
        (256, 128, 32, 64, 8, 4),
    )
)
ALLOWED = 2e-2  # difference from cuDNN, which may round otherwise, relative to the largest entry


def _with_statistics(x: Tensor, weight: Tensor, bias: Tensor, none: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor]:
    blocks = -(-(x.shape[1] * x.shape[2]) // reference.ROWS)
    partials = x.new_empty((x.shape[0], blocks, 2, weight.shape[1]), dtype=torch.float32)
    return with_descriptors(x, weight, bias, none, tiles, partials), partials


def _compile(tiles: Tiles, function: Callable = with_descriptors) -> str:
    """Leaves the kernel in Triton's cache on disk; why it failed, or nothing."""
    try:
        x = torch.zeros((1, 3, 256, 320), dtype=torch.bfloat16, device="cuda")
        function(x, x.new_zeros(3, 320, 320), x.new_zeros(320), x.new_empty(0), tiles)
        torch.cuda.synchronize()
    except Exception as failure:
        return reason(failure)
    return ""


def _cudnn(x: Tensor, filters: Tensor, bias: Tensor | None) -> Tensor:
    return functional.conv2d(x.permute(0, 3, 1, 2), filters, bias, padding=(1, 0)).permute(0, 2, 3, 1)


def _measure(case: Case, candidates: list[Tiles]) -> str:
    """Prints the times at one shape, the shortest first, and returns the line of the table."""
    copies = cold_copies(case.make("cuda", torch.bfloat16), "cuda")
    x, weight = copies[0][:2]
    clips, frames, sites, inner = x.shape
    print(f"\n{case.name}: {clips} x {frames} x {sites} x {inner} -> {weight.shape[1]}, {len(copies)} buffers")
    filters = [c[1].permute(1, 2, 0).unsqueeze(-1).contiguous(memory_format=torch.channels_last) for c in copies]
    expected = _cudnn(x, filters[0], copies[0][2])
    timed = cold("cuda")
    pairs = list(zip(copies, filters, strict=True))
    times = checked_times({"cuDNN without bias": [partial(_cudnn, c[0], f, None) for c, f in pairs]}, timed)
    calls = {"cuDNN": [partial(_cudnn, c[0], f, c[2]) for c, f in pairs]}
    calls |= {str(tuple(tiles)): [partial(with_descriptors, *c, tiles) for c in copies] for tiles in candidates}
    times |= checked_times(calls, timed, expected, ALLOWED)
    ranked = sorted((t for t in candidates if str(tuple(t)) in times), key=lambda t: times[str(tuple(t))])
    chosen = [t for t in ranked if t.block_m % reference.ROWS == 0][:3]
    calls = {f"{tuple(tiles)} with statistics": [partial(_with_statistics, *c, tiles) for c in copies] for tiles in chosen}
    times |= checked_times(calls, timed, expected, ALLOWED)
    # three taps for every frame, as cuDNN's speed is given, although the first and last frame need two
    work = 6e-6 * expected.numel() * inner
    print_ranked(times, lambda microseconds: f"{work / microseconds:.0f} TFLOP/s")
    return f"    ({clips * frames * sites}, {inner}, {weight.shape[1]}): Tiles{tuple(ranked[0])}," if ranked else ""


def main() -> None:
    # before this process uses the GPU, which does not survive a fork
    workers = min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        reasons = pool.map(_compile, CANDIDATES)
        pool.map(partial(_compile, function=_with_statistics), [t for t in CANDIDATES if t.block_m % reference.ROWS == 0])
        failures = dict(zip(CANDIDATES, reasons, strict=True))
    for tiles, why in failures.items():
        if why:
            print(f"{tuple(tiles)}: {why}")
    if not descriptors_fit(torch.zeros((1, 8), dtype=torch.bfloat16, device="cuda")):
        raise SystemExit("this GPU has no tensor descriptors, or no room for these tiles")
    torch.backends.cudnn.benchmark = True
    best = [_measure(case, [t for t, why in failures.items() if not why]) for case in FORWARD.benchmarks]
    print_measured(best)


if __name__ == "__main__":
    main()
