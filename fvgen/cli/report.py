"""report.json: everything needed to judge a result or to repeat it."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import math
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fvgen import __version__
from fvgen.pipeline import Prepared

PACKAGES = ("torch", "triton", "diffusers", "numpy", "opencv-python-headless", "pycolmap", "scipy", "safetensors", "pillow", "av")


def write_report(
    path: Path, arguments: argparse.Namespace, prepared: Prepared, facts: dict[str, Any], timings: dict[str, float]
) -> dict[str, Any]:
    """Writes and returns the report. Only ``run`` differs between two runs of the same command."""
    coverage = prepared.renders.coverage.float().mean((1, 2)).tolist()
    left_out = ("module", "command", "output", "overwrite")
    quality = asdict(prepared.scene.quality)
    report = {
        "command": arguments.command,
        "arguments": {k: v for k, v in sorted(vars(arguments).items()) if k not in left_out},
        "seed": arguments.seed,
        "frames": len(prepared.renders.rgb),
        "photo_frames": list(prepared.photo_frames),
        "segments": [[s[0], s[-1]] for s in prepared.segments],
        **facts,
        "geometry": {k: _rounded(v) for k, v in quality.items()},
        "coverage": [round(v, 4) for v in coverage],
        "device": device_name(prepared.renders.rgb.device),
        "versions": versions(),
        "run": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "output": str(arguments.output),
            "timings_s": {k: round(v, 3) for k, v in timings.items()},
        },
    }
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return report


def versions() -> dict[str, str]:
    """Versions of FVGen, Python and the packages that have a part in the result."""
    found = {"fvgen": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"


def directory_sha256(root: Path) -> str:
    """Digest of the names and contents of all files of a model directory."""
    total = hashlib.sha256()
    for file in sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{digest}  {file.relative_to(root).as_posix()}\n".encode())
    return total.hexdigest()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
