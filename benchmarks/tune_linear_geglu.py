"""Times ways to cut up the product at the network's shapes: ``python -m benchmarks.tune_linear_geglu`` on a GPU with TMA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from triton.testing import do_bench_cudagraph

from benchmarks.tuning import checked_times, print_measured, print_ranked
from fvgen.kernels.geglu.triton import geglu
from fvgen.kernels.linear_geglu.spec import FORWARD
from fvgen.kernels.linear_geglu.triton import DEFAULT, Tiles, descriptors_fit, with_descriptors

# rows, channels, depth, warps, stages, persistent programs per multiprocessor
CANDIDATES = tuple(
    Tiles(*numbers)
    for numbers in (
        (64, 64, 64, 4, 2),
        (64, 64, 64, 4, 3),
        (64, 64, 64, 4, 4),
        (64, 128, 32, 4, 3),
        (64, 128, 64, 4, 2),
        (128, 64, 32, 4, 4),
        (128, 64, 64, 4, 2),
        (128, 64, 64, 4, 3),
        (128, 64, 64, 8, 2),
        (128, 64, 64, 8, 3),
        (128, 128, 32, 8, 5),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 128, 8, 2),
        (256, 64, 64, 8, 3),
        (256, 64, 64, 8, 4),
        (64, 128, 64, 4, 2, 2),
        (128, 64, 32, 4, 4, 2),
        (128, 64, 64, 4, 2, 2),
        (128, 64, 64, 4, 3, 2),
        (128, 64, 64, 8, 3, 2),
        (128, 128, 64, 8, 3, 1),
        (128, 128, 64, 8, 4, 1),
        (256, 64, 64, 8, 3, 1),
    )
)
ALLOWED = 2e-2  # difference from the two steps, which round the product to bfloat16, relative to the largest entry


def warm(calls: Sequence[Callable[[], Any]]) -> float:
    """Microseconds of the first of the calls."""
    return 1e3 * do_bench_cudagraph(calls[0], rep=4, return_mode="median")


def main() -> None:
    best = []
    for case in FORWARD.benchmarks:
        x, weight, bias = case.make("cuda", torch.bfloat16)
        if not descriptors_fit(x, weight):
            raise SystemExit("this GPU has no tensor descriptors, or no room for these tiles")
        (rows, inner), channels = x.shape, weight.shape[0] // 2
        expected = geglu(functional.linear(x, weight, bias))
        calls = {
            "F.linear alone": partial(functional.linear, x, weight, bias),
            "F.linear, then geglu": lambda x=x, weight=weight, bias=bias: geglu(functional.linear(x, weight, bias)),
            f"{tuple(DEFAULT)} erf": partial(with_descriptors, x, weight, bias, DEFAULT, exact=True),
        }
        calls |= {str(tuple(tiles)): partial(with_descriptors, x, weight, bias, tiles) for tiles in CANDIDATES}
        print(f"\n{case.name}: {rows} x {inner} -> {channels}")
        alone = {"F.linear alone": calls.pop("F.linear alone")}
        times = checked_times(alone, warm) | checked_times(calls, warm, expected, ALLOWED)
        work = 4e-6 * rows * inner * channels
        print_ranked(times, lambda microseconds, work=work: f"{work / microseconds:.0f} TFLOP/s")
        ours = {tiles: times[str(tuple(tiles))] for tiles in CANDIDATES if str(tuple(tiles)) in times}
        if ours:
            best.append(f"    ({rows}, {inner}, {channels}): Tiles{tuple(min(ours, key=lambda tiles: ours[tiles]))},")
    print_measured(best)


if __name__ == "__main__":
    main()
