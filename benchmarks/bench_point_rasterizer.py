"""Point rasterizer: forward at the spec's shapes and backward at FVGen's.

    python -m pytest benchmarks/bench_point_rasterizer.py
    python -m benchmarks.bench_point_rasterizer --json OUT.json

Times are CUDA events around one call, inputs in device memory; each round uses another copy of the inputs, so that no round finds
the previous one's data in L2. Compilation and allocation happen in the warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PEAK_BYTES_PER_SECOND = 4.8e12  # H200 data sheet; only used to state the share of the roofline
COPIES = 3


def _spec() -> Any:
    from fvgen.kernels.point_rasterizer.spec import RENDER

    return RENDER


def _backward(args: tuple) -> Callable[[], Any]:
    import torch

    points, features, cameras, height, width, radius, k, mode, background, _ = args
    image, depth, idx = torch.ops.fvgen.render_points(points, features, cameras, height, width, radius, k, mode, background, True)
    upstream, none = torch.randn_like(image), torch.zeros_like(depth)
    return lambda: torch.ops.fvgen.render_points_backward(upstream, none, points, features, cameras, idx, radius, mode)


def _forward(args: tuple) -> Callable[[], Any]:
    import torch

    return lambda: torch.ops.fvgen.render_points(*args)


def workloads() -> list[tuple[str, Any, Callable[[tuple], Callable[[], Any]]]]:
    """``(name, case, prepare)`` where ``prepare(args)`` returns the call to be timed."""
    spec = _spec()
    out = [(f"raster_{case.name}_ms", case, _forward) for case in spec.benchmarks]
    first = spec.benchmarks[0]
    return [*out, (f"raster_backward_{first.name}_ms", first, _backward)]


def time_calls(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Milliseconds of ``rounds`` calls, taken in turn from ``calls``."""
    import torch

    for call in calls * 2:
        call()
    torch.cuda.synchronize()
    times = []
    for n in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        calls[n % len(calls)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def where() -> dict[str, str]:
    """Machine, versions, commit and command of a record."""
    import torch

    def ask(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return "unknown"

    commit = ask("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "commit": os.environ.get("FVGEN_COMMIT", commit),
        "command": shlex.join([Path(sys.executable).name, "-m", "benchmarks.bench_point_rasterizer", *sys.argv[1:]]),
    }


def measure(rounds: int = 60) -> list[dict]:
    """One record per workload: median, 10 % and 90 % quantile in milliseconds, peak memory, share of the bandwidth bound."""
    import torch

    os.environ["FVGEN_KERNELS"] = "strict"
    context = where()
    records = []
    for name, case, prepare in workloads():
        args = case.make("cuda", torch.float32)
        copies = [tuple(a.clone() if torch.is_tensor(a) else a for a in args) for _ in range(COPIES)]
        calls = [prepare(copy) for copy in copies]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        times = time_calls(calls, rounds)
        deciles = statistics.quantiles(times, n=10)
        median = statistics.median(times)
        record = {
            "name": name,
            "median_ms": median,
            "p10_ms": deciles[0],
            "p90_ms": deciles[-1],
            "rounds": rounds,
            "extra_memory_bytes": torch.cuda.max_memory_allocated() - before,
            "views": args[2].shape[0],
            "points": args[0].shape[0],
            "image_size": list(args[3:5]),
            "radius": args[5],
            "points_per_pixel": args[6],
            **context,
        }
        if prepare is _forward:
            cost = _spec().cost(*args)
            record["bytes"] = cost.bytes
            record["bandwidth_bound_ms"] = 1e3 * cost.bytes / PEAK_BYTES_PER_SECOND
        records.append(record)
        del args, copies, calls
        torch.cuda.empty_cache()
    return records


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(4), ids=["16x327680", "25x294912", "16x4M", "backward"])
def test_speed(benchmark: Any, index: int) -> None:
    import torch

    _, case, prepare = workloads()[index]
    call = prepare(case.make("cuda", torch.float32))

    def timed() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(timed, warmup_rounds=3, rounds=20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    records = measure(options.rounds)
    for r in records:
        print(f"{r['name']:40s} {r['median_ms']:8.3f} ms  [{r['p10_ms']:.3f}, {r['p90_ms']:.3f}]")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
