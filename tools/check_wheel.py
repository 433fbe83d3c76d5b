"""Fails if a wheel lacks something or carries something that does not belong into it.

python tools/check_wheel.py dist/fvgen-*.whl [--cuda]
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGEST_MB = 40
NEEDED = (
    "fvgen/assets/tiny/model_index.json",
    "fvgen/assets/example/transforms.json",
    "fvgen/kernels/point_rasterizer/README.md",
)
EXTENSION = "fvgen/_C.abi3.so"


def sources() -> set[str]:
    """Names in the wheel of every module and every bundled file of the checkout."""
    package = [p for p in (ROOT / "fvgen").rglob("*") if p.is_file() and (p.suffix == ".py" or "assets" in p.parts)]
    kernels = (ROOT / "kernels").rglob("*.py")
    return {str(p.relative_to(ROOT)) for p in package} | {f"fvgen/{p.relative_to(ROOT)}" for p in kernels}


def complaints(wheel: Path, cuda: bool) -> list[str]:
    """What is wrong with the wheel, one sentence each."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = {n for n in names if n.split("/")[0].endswith(".dist-info")}
    found = [f"{n} is missing" for n in sorted((sources() | set(NEEDED)) - names)]
    found += [f"{n} does not belong here" for n in sorted(names - info) if not n.startswith("fvgen/")]
    found += [f"{n} does not belong here" for n in sorted(names) if n.endswith((".pyc", ".cu", ".cuh", ".cpp", ".o"))]
    extensions = {n for n in names if n.endswith((".so", ".pyd"))}
    if extensions != ({EXTENSION} if cuda else set()):
        found.append(f"compiled files are {sorted(extensions)}")
    if not any(n.endswith("licenses/LICENSE") for n in info):
        found.append("LICENSE is missing")
    ending = "-cp311-abi3-linux_x86_64.whl" if cuda and sys.platform == "linux" else "-py3-none-any.whl"
    if not wheel.name.endswith(ending) and not (cuda and "-abi3-" in wheel.name):
        found.append(f"the name should end in {ending}")
    if (megabytes := wheel.stat().st_size / 1e6) > LARGEST_MB:
        found.append(f"{megabytes:.1f} MB is more than {LARGEST_MB} MB")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--cuda", action="store_true", help="expect the CUDA extension")
    options = parser.parse_args()
    found = complaints(options.wheel, options.cuda)
    print("\n".join(found) or f"{options.wheel.name}: complete, {options.wheel.stat().st_size / 1e6:.1f} MB")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
