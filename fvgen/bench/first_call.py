"""What the first clip costs: a process of its own with an empty Triton cache, from the loaded model to the frames.

``python -m fvgen.bench.first_call MODEL DEVICE RUNNER [--quick]`` does so in its own process; it prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fvgen.bench.kernels import Say
from fvgen.bench.model import BenchModel, find_bench_model, render_call
from fvgen.bench.runner import RUNNERS, find_runners
from fvgen.bench.sampler import describe, first_call_name
from fvgen.bench.timing import inference, time_once

LIMIT_S = 600


def measure_first_call(
    model: BenchModel, device: str, runner: str = "engine", quick: bool = False, say: Say = lambda _: None
) -> dict[str, Any]:
    """The record of the seconds from the loaded model to the first frames: packing, compiling, choosing algorithms, recording.

    Args:
        model: what a new process loads.
        device: "cpu", "cuda" or "cuda:N".
        runner: one of ``RUNNERS``.
        quick: a clip of 4 frames and 64 x 96 pixels.
        say: told what is measured next.
    """
    say(f"{model.name}, first clip of a new process")
    record = {"name": first_call_name(model), **describe(model, runner, quick), "batch": 1, "stage": "first call", "unit": "s"}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})\nfrom {__name__} import main; main()"
    command = [sys.executable, "-c", code, model.source, device, runner, *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as cache, patch.dict("os.environ", {"TRITON_CACHE_DIR": cache}):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return {**record, "median_s": None, "failed": f"longer than {LIMIT_S} s"}
    if done.returncode:
        return {**record, "median_s": None, "failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:200]}
    return {**record, **json.loads(done.stdout.splitlines()[-1]), "count": 1, "method": "perf_counter"}


def main(argv: list[str] | None = None) -> None:
    """Loads, and prints ``median_s``: making the runner (``make_s``) and its first clip from the points on (``clip_s``)."""
    parser = argparse.ArgumentParser(description="Seconds to the first clip of this process")
    parser.add_argument("model")
    parser.add_argument("device")
    parser.add_argument("runner", choices=RUNNERS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    device = options.device
    model, make = find_bench_model(options.model, device), find_runners(options.runner).student
    bundle = model.load(device)
    made: list[Any] = []
    with inference():
        render = render_call(model.index, device, 1, options.quick)
        making = time_once(lambda: made.append(make(bundle)), device)
        clip = time_once(lambda: made[0].clip(render(), 0), device)
    print(json.dumps({"median_s": 1e-3 * (making + clip), "make_s": 1e-3 * making, "clip_s": 1e-3 * clip}))


if __name__ == "__main__":
    main()
