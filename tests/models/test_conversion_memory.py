"""How much main memory a conversion takes: at most 1.3 times the checkpoint, beside what interpreter and libraries take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import ROOT, environment
from tests.reference_checkpoints import dust3r_state, viewcrafter_spec, viewcrafter_state, write_dust3r, write_viewcrafter

BOUND = 1.3
# The high-water mark of a process is its own, unlike ``ru_maxrss``, which begins with its parent's.
CODE = """
import re, sys
import fvgen.recipes.presets as presets
from fvgen.cli import main
from tests.processes import ROOT, environment
from tests.reference_checkpoints import viewcrafter_spec

size, *command = sys.argv[1:]
presets.get_preset = lambda name: viewcrafter_spec(size)
status = main(command)
with open("/proc/self/status") as text:
    print("peak", re.search(r"VmHWM:\\s+(\\d+) kB", text.read())[1])
sys.exit(status)
"""


def write(path: Path, kind: str, size: str, dtype: torch.dtype) -> None:
    if kind == "dust3r":
        write_dust3r(path, size, dust3r_state(size, dtype))
    else:
        write_viewcrafter(path, viewcrafter_state(viewcrafter_spec(size), None, dtype))


def peak(size: str, *command: object) -> int:
    """Bytes of the most that was resident while a command ran."""
    words = [sys.executable, "-c", CODE, size, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), check=False)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "dtype", "stored"),
    [("viewcrafter", torch.float32, "fp16"), ("viewcrafter", torch.float16, "fp32"), ("dust3r", torch.float32, "fp16")],
)
def test_peak(tmp_path: Path, kind: str, dtype: torch.dtype, stored: str) -> None:
    checkpoints = {size: tmp_path / f"{size}.ckpt" for size in ("tiny", "middle")}
    peaks = {}
    for size, path in checkpoints.items():
        write(path, kind, size, dtype)
        peaks[size] = peak(size, "convert", kind, path, "--dtype", stored, "--output", tmp_path / f"{size}_out")
    bytes_of = {size: path.stat().st_size for size, path in checkpoints.items()}
    assert bytes_of["middle"] > 100e6
    ratio = (peaks["middle"] - peaks["tiny"]) / (bytes_of["middle"] - bytes_of["tiny"])
    print(f"{kind} {dtype} to {stored}: {bytes_of['middle'] / 1e6:.0f} MB, peak {ratio:.2f} of it")
    assert ratio <= BOUND
