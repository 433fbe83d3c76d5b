"""Times ways to cut up the norms and GEGLU: ``python -m benchmarks.tune_norms [--ops NAME ...] [--json FILE]`` on a GPU.

Candidates are compiled beforehand, one process per shape. Each is checked against the reference; the fastest must repeat exactly.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.tuning import checked_times, cold, print_ranked, repeats
from fvgen.bench.bandwidth import copy_bandwidth
from fvgen.bench.kernels import COMPILE, reason
from fvgen.bench.record import context, write_records
from fvgen.bench.timing import cold_copies
from fvgen.kernels._spec import Case, OpSpec
from fvgen.kernels.geglu import spec as geglu
from fvgen.kernels.geglu.triton import Tile
from fvgen.kernels.geglu.triton import geglu as geglu_forward
from fvgen.kernels.group_norm_silu import spec as group_norm_silu
from fvgen.kernels.group_norm_silu.reference import SMALL, is_small
from fvgen.kernels.group_norm_silu.triton import Blocks, Joining, Single
from fvgen.kernels.group_norm_silu.triton import group_norm_silu as group_norm_silu_forward
from fvgen.kernels.group_norm_silu.triton import group_norm_silu_skip as group_norm_silu_skip_forward
from fvgen.kernels.group_norm_silu.triton_backward import group_norm_silu_backward
from fvgen.kernels.group_norm_silu.triton_backward import is_small as is_small_backward
from fvgen.kernels.layer_norm_residual import spec as layer_norm_residual
from fvgen.kernels.layer_norm_residual.triton import Launch, Rows, layer_norm_residual_backward
from fvgen.kernels.layer_norm_residual.triton import layer_norm_residual as layer_norm_residual_forward

DEFAULT = "as it is"
ALLOWED = 2**-7  # outputs are rounded to bfloat16, relative to the largest entry
SHOWN = 3  # candidates of a shape, and of an operator

# warps of a program, programs per multiprocessor
LAUNCHES = ((1, 12), (1, 16), (2, 8), (4, 3))
# elements of a tile of whole rows, warps, whether the cache is told that nothing is read again
ROWS = ((4096, 4), (4096, 8), (2048, 4), (2048, 2), (2048, 1), (1024, 1), (4096, 4, True), (1024, 1, True))
# rows of a program, rows of a tile, warps, tiles on their way
SUMS = ((128, 16, 4, 1), (128, 16, 4, 2), (128, 16, 4, 4), (256, 16, 4, 2))
# rows of a program, rows of a tile, warps, -, whether the cache is told that nothing is read again
GRADIENTS = ((64, 32, 4, 1, True), (64, 32, 8, 1, True), (128, 32, 4, 1, True), (128, 32, 8, 1, True))
# rows, channels, warps, neighbours along a row, whether the cache is told that x is not read again
TILES = ((4, 256, 2, True, False), (4, 256, 4, True, False), (2, 512, 4, True, False))
# the forward pass of the group norm, as above: the first pass without a sum, with one, and the last pass
STATISTICS = (
    (128, 16, 4, 1, False),
    (128, 16, 4, 2, False),
    (128, 16, 4, 4, False),
    (128, 32, 8, 2, False),
    (64, 16, 4, 4, False),
    (256, 16, 4, 4, False),
)
SUMMED = (
    (64, 16, 4, 1, True),
    (128, 16, 4, 1, True),
    (128, 16, 4, 1, False),
    (128, 32, 8, 1, True),
    (128, 32, 4, 1, True),
    (256, 16, 4, 1, True),
)
NORMALISED = (
    (64, 16, 4, 1, True),
    (64, 16, 4, 1, False),
    (128, 16, 4, 1, True),
    (16, 16, 2, 1, True),
    (32, 32, 4, 1, True),
    (32, 32, 8, 1, True),
    (64, 64, 8, 1, True),
    (128, 32, 8, 1, True),
)
# partial statistics at a time, and for a thread
JOINED = ((8192, 4), (8192, 16), (2048, 4))
# one pass for groups of so many elements, and for a thread; none of them
SINGLE = ((SMALL, 8), (SMALL, 16), (SMALL, 32), (SMALL, 64), (0, 16))
SMALL_WARPS = (4, 8, 16)  # of one pass of the backward pass


@dataclass(frozen=True)
class Search:
    """An operator's fast version and what it may be given beyond the operator's arguments, by name."""

    spec: OpSpec
    function: Callable[..., Any]
    candidates: dict[str, dict[str, Any]]

    def of(self, args: tuple) -> dict[str, dict[str, Any]]:
        """The candidates for these arguments: of a group norm those of the passes, or the single pass, that it takes."""
        if self.spec is group_norm_silu.BACKWARD:
            small, unused = is_small_backward(args[2].shape[1], args[2].shape[2] // args[8]), ()
        elif self.spec is group_norm_silu.FORWARD:
            small = is_small(args[0].shape[1], args[0].shape[2] // args[5])
            unused = ("STATISTICS",) if args[1].numel() else ("SUMMED",)
        elif self.spec is group_norm_silu.SKIP:
            small, unused = is_small(args[0].shape[1], (args[0].shape[2] + args[2].shape[2]) // args[6]), ()
        else:
            return {DEFAULT: {}, **self.candidates}
        single = {n: given for n, given in self.candidates.items() if n.split(" = ")[0] in _SINGLE}
        several = {n: given for n, given in self.candidates.items() if n not in single and not n.startswith(unused)}
        candidates = single if small else several
        return {DEFAULT: {}, **candidates}


def _blocks(name: str, argument: str, values: tuple[tuple, ...]) -> dict[str, dict[str, Any]]:
    return {f"{name} = Blocks{given}": {argument: Blocks(*given)} for given in values}


_AFTER = {f"JOINED = Joining{given}": {"joined": Joining(*given)} for given in JOINED}
_AFTER |= _blocks("NORMALISED", "last", NORMALISED)
_AFTER |= {f"SINGLE = Single{given}": {"single": Single(*given)} for given in SINGLE}
_SINGLE = ("SINGLE", "SMALL_WARPS")  # constants of a single pass
SEARCHES = (
    Search(
        layer_norm_residual.FORWARD,
        layer_norm_residual_forward,
        {f"NARROW_ROWS or WIDE_ROWS = Rows{given}": {"launch": Rows(*given)} for given in ROWS},
    ),
    Search(
        layer_norm_residual.BACKWARD,
        layer_norm_residual_backward,
        {f"BACKWARD = Launch{given}": {"launch": Launch(*given)} for given in LAUNCHES},
    ),
    Search(geglu.FORWARD, geglu_forward, {f"FORWARD = Tile{given}": {"tile": Tile(*given)} for given in TILES}),
    Search(
        group_norm_silu.BACKWARD,
        group_norm_silu_backward,
        _blocks("SUMS", "first", SUMS)
        | _blocks("GRADIENT", "last", GRADIENTS)
        | {f"SMALL_WARPS = {warps}": {"warps": warps} for warps in SMALL_WARPS},
    ),
    Search(
        group_norm_silu.FORWARD,
        group_norm_silu_forward,
        _blocks("STATISTICS", "first", STATISTICS) | _blocks("SUMMED", "first", SUMMED) | _AFTER,
    ),
    Search(group_norm_silu.SKIP, group_norm_silu_skip_forward, _blocks("SUMMED", "first", SUMMED) | _AFTER),
)


def _compiled(spec: OpSpec) -> Callable[..., Any]:
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # the processes of the shapes are enough
    inductor.autotune_local_cache = False  # what it chooses while they share the GPU means nothing
    return torch.compile(spec.baselines["eager"], dynamic=False)


@torch.no_grad()
def prepare(search: Search, case: Case, device: str) -> None:
    """Runs everything once, which leaves the compiled code in the caches on disk; what fails is told by the measurement."""
    torch.set_num_threads(1)
    with contextlib.suppress(Exception):
        args = case.make(device, torch.bfloat16)
        calls: list[Callable[..., Any]] = [partial(search.function, **given) for given in search.of(args).values()]
        for call in [_compiled(search.spec), *calls]:
            with contextlib.suppress(Exception):
                call(*args)
        if device != "cpu":
            torch.cuda.synchronize()


def prepare_all(work: list[tuple[Search, Case]], device: str, seconds: float) -> list[tuple]:
    """The arguments of every shape, on the CPU, made while :func:`prepare` works on each in a process of its own.

    This process must not have used the GPU, which does not survive a fork.
    """
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=prepare, args=(*pair, device)) for pair in work]
    end = time.monotonic() + seconds
    for process in processes:
        process.start()
    with ThreadPoolExecutor() as pool:
        given = list(pool.map(lambda pair: pair[1].make("cpu", torch.bfloat16), work))
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
        process.join()
    if late:
        print(f"{len(late)} shapes were not compiled beforehand in {seconds:.0f} s")
    return given


@torch.no_grad()
def measure(search: Search, name: str, args: tuple, device: str, copy_rate: float) -> dict[str, float]:
    """Prints the best of a shape and returns microseconds by candidate, torch.compile's among them."""
    spec = search.spec
    args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)
    candidates = search.of(args)
    expected = spec.reference(*args)
    copies = cold_copies(args, device)
    timed = cold(device, rounds=10, seconds=0.05)
    calls = {n: [partial(search.function, *c, **given) for c in copies] for n, given in candidates.items()}
    times = checked_times(calls, timed, expected, ALLOWED)
    for best in sorted(times, key=times.__getitem__)[:1]:
        try:
            repeats(calls[best][0])
        except ValueError as failure:
            print(f"{best}: {reason(failure)}")
            del times[best]
    del expected
    compiled = _compiled(spec)
    rival = checked_times({COMPILE: [partial(compiled, *c) for c in copies]}, timed)
    torch._dynamo.reset()
    assert spec.cost is not None
    least = spec.cost(*args).bytes / copy_rate * 1e6
    others = f"{COMPILE} {rival.get(COMPILE, math.nan):.1f} us, a copy {least:.1f} us"
    print(f"{spec.name} {name}: {others}, {len(copies)} buffers")
    ranked = sorted(times, key=times.__getitem__)
    shown = [*ranked[:SHOWN], *([DEFAULT] if DEFAULT in ranked[SHOWN:] else [])]
    print_ranked({n: times[n] for n in shown}, lambda microseconds: f"{100 * least / microseconds:.0f} %")
    return {**times, **rival}


def print_choice(search: Search, found: list[dict[str, float]]) -> None:
    """For each constant, the candidates that are best over all shapes: the mean of their times over those of the present one."""
    scores: dict[str, float] = {}
    for name in search.candidates:
        ratios = [times[name] / times[DEFAULT] for times in found if name in times and DEFAULT in times]
        if ratios:
            scores[name] = math.exp(sum(map(math.log, ratios)) / len(ratios))
    for constant in dict.fromkeys(name.split(" = ")[0] for name in search.candidates):
        own = sorted((name for name in scores if name.startswith(constant + " ")), key=scores.__getitem__)
        for name in own[:SHOWN]:
            print(f"{scores[name]:9.3f} of the present time  {search.spec.name}: {name}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="every time, as a result file")
    names = [search.spec.name for search in SEARCHES]
    parser.add_argument(
        "--ops", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)} (default: all)"
    )
    parser.add_argument("--seconds", type=float, default=80.0, help="no shape is begun after so many (default: 80)")
    options = parser.parse_args(argv)
    start, device = time.monotonic(), "cuda"
    searches = [search for search in SEARCHES if search.spec.name in options.ops]
    numbered = [(n, s, c) for s in searches for n, c in enumerate(s.spec.benchmarks)]
    work = [(s, c) for _, s, c in sorted(numbered, key=lambda item: item[0])]  # if time runs out, each operator has some shapes
    given = prepare_all(work, device, 0.5 * options.seconds)
    if not torch.cuda.is_available():
        print("there is no CUDA device; run this on a GPU", file=sys.stderr)
        return 2
    print(f"compiled after {time.monotonic() - start:.0f} s", flush=True)
    copy_rate, _ = copy_bandwidth(device)
    shared = {"suite": "tune", "copy_bytes_per_second": copy_rate, **context("python -m benchmarks.tune_norms")}
    found: dict[str, list[dict[str, float]]] = {}
    records = []
    for (search, case), args in zip(work, given, strict=True):
        if time.monotonic() - start > options.seconds:
            print(f"{search.spec.name} {case.name}: left out, {options.seconds:.0f} s are over")
            continue
        times = measure(search, case.name, args, device, copy_rate)
        found.setdefault(search.spec.name, []).append(times)
        best = min((t for n, t in times.items() if n != COMPILE), default=None)
        name = f"tune_{search.spec.name}_{case.name}_us"
        records.append({"name": name, "value": best, "unit": "us", "candidates_us": times, **shared})
        if options.json:
            write_records(options.json, records)
        torch.cuda.empty_cache()
    print(f"\nmeasured after {time.monotonic() - start:.0f} s; mean over the shapes:")
    for search in searches:
        print_choice(search, found.get(search.spec.name, []))
    return 0


if __name__ == "__main__":
    sys.exit(main())
