"""``fvgen doctor``: what is installed, what runs where, and what to do about the rest."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import fvgen

REQUIRED = (
    "torch",
    "triton",
    "diffusers",
    "numpy",
    "opencv-python-headless",
    "pycolmap",
    "scipy",
    "safetensors",
    "pillow",
    "tqdm",
)
OPTIONAL = {
    "av": ("better video files", "pip install av"),
    "accelerate": ("distillation", "pip install 'fvgen[train]'"),
    "flash-attn": ("another attention to benchmark against", "pip install 'fvgen[flash]'"),
    "nvidia-ml-py": ("GPU clocks in benchmarks", "pip install 'fvgen[bench]'"),
    "pytorch3d": ("the renderer that tests and benchmarks compare with", "see pytorch3d.org; nothing else needs it"),
}


def run(_arguments: argparse.Namespace) -> None:
    """Prints one screen."""
    print(f"fvgen {fvgen.__version__} in {Path(fvgen.__file__).parent}")
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    todo: list[str] = []
    _packages(todo)
    _machine(todo)
    _kernels(todo)
    _assets(todo)
    print("\nto do")
    for line in todo or ["nothing: everything that fvgen needs is here"]:
        print(f"  {line}")


def version_of(package: str) -> str | None:
    """The installed version, None without the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages(todo: list[str]) -> None:
    print("\npackages")
    found = {name: version_of(name) for name in REQUIRED}
    print("  " + ", ".join(f"{name} {version or 'MISSING'}" for name, version in found.items()))
    missing = [name for name, version in found.items() if version is None]
    if missing:
        todo.append(f"install what is required: pip install {' '.join(missing)}")
    for name, (purpose, how) in OPTIONAL.items():
        version = version_of(name)
        print(f"  {name + ' ' + version if version else 'no ' + name:<24}for {purpose}" + ("" if version else f": {how}"))


def _machine(todo: list[str]) -> None:
    print("\nmachine")
    print(f"  {os.cpu_count()} CPU threads, {_host_memory()}")
    driver = _driver()
    try:
        import torch
    except ImportError as error:
        print(f"  PyTorch does not load: {error}")
        todo.append("install PyTorch: see pytorch.org")
        return
    print(
        f"  PyTorch built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}, driver {driver or 'not found'}"
    )
    if not torch.cuda.is_available():
        print("  no usable GPU: everything runs on the CPU")
        if driver and torch.version.cuda is None:
            todo.append("this PyTorch has no CUDA: install a CUDA build (pytorch.org) to use the GPU")
        elif driver:
            todo.append("PyTorch does not see the GPU: check nvidia-smi, the age of the driver and CUDA_VISIBLE_DEVICES")
        return
    for i in range(torch.cuda.device_count()):
        free, total = (v / 2**30 for v in torch.cuda.mem_get_info(i))
        major, minor = torch.cuda.get_device_capability(i)
        name = torch.cuda.get_device_name(i)
        print(f"  cuda:{i} {name}, compute capability {major}.{minor}, {free:.1f} of {total:.1f} GiB free")


def _host_memory() -> str:
    try:
        rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        sizes = {row[0].rstrip(":"): int(row[1]) / 2**20 for row in rows if len(row) > 1}
        return f"{sizes['MemAvailable']:.1f} of {sizes['MemTotal']:.1f} GiB memory free"
    except (OSError, KeyError, ValueError):
        return "memory unknown"


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return shown[0] if shown else None


def _kernels(todo: list[str]) -> None:
    print("\noperators (FVGEN_KERNELS chooses; reference = plain PyTorch)")
    try:
        from fvgen.kernels import status
        from fvgen.kernels._extension import find, load

        rows = status()
        import torch

        reason = load()
    except (ImportError, ValueError) as error:
        print(f"  not available: {error}")
        todo.append(f"the operators do not load: {error}")
        return
    for name, path, why in rows:
        print(f"  {name:<29} {path:<10} {why}")
    print(f"  CUDA extension fvgen._C       {'loaded' if reason is None else f'not loaded: {reason}'}")
    if torch.cuda.is_available() and reason is not None and find() is None:
        todo.append("build the CUDA extension: FVGEN_BUILD_CUDA=1 pip install --no-build-isolation fvgen (needs nvcc)")


def _assets(todo: list[str]) -> None:
    from fvgen.models.bundle import read_index
    from fvgen.pipeline import BUNDLED
    from fvgen.utils.errors import UserError

    print("\nbundled")
    try:
        index = read_index(BUNDLED["tiny"])
        print(f"  model tiny: {index.width}x{index.height}, {index.frames} frames")
    except UserError:
        print("  model tiny: MISSING")
        todo.append("the bundled model is missing: install fvgen again, or pass --model DIR")
    from fvgen.cli.demo import EXAMPLE

    print(f"  example scene: {'present' if (EXAMPLE / 'transforms.json').is_file() else 'MISSING'}")
