"""Writes docs/kernel_resources.md: what every Triton kernel takes on each architecture, compiled without a GPU.

python tools/kernel_resources.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton

from fvgen import kernels
from fvgen.kernels._triton import TritonKernel

ARCHITECTURES = (80, 90, 100)
PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernel_resources.md"
HEAD = """# Resources of the Triton kernels, compiled by Triton {version}

Written by `python tools/kernel_resources.py`, which needs no GPU. A cell has registers of a thread / bytes of stack of a thread /
bytes of shared memory of a program, a dash where the architecture lacks what the kernel uses.
`tests/kernels/test_ahead_of_time.py` fails if a kernel has a stack or spills. Pointers are multiples of 16 bytes, as at a launch.
The CUDA kernels are in `kernels/point_rasterizer/README.md`.

| operator | kernel | constants that tell its variants apart; warps | {columns} |
|---|---|---|{lines}
"""


def resources(kernel: TritonKernel, capability: int) -> str:
    """``registers / stack / shared``; shared memory is given at the launch, so Triton knows it, the binary does not."""
    if capability < kernel.least:
        return "–"
    compiled = kernel.compile(capability)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = dict(word.split(":")[:2] for line in text.splitlines() if "REG:" in line for word in line.split())
    return f"{used['REG']} / {used['STACK']} / {compiled.metadata.shared}"


def short(name: str, value: Any) -> str:
    """A constant in words: flags and left out tensors by name alone."""
    name = name.lower()
    if value is None or value is False:
        return f"no {name}"
    return name if value is True else f"{name} {value}"


def variant(kernel: TritonKernel, others: list[TritonKernel]) -> str:
    """The constants that differ among the kernels of this name, float32 where not bfloat16, and the warps."""
    differ = {n: v for n, v in kernel.constants.items() if any(o.constants.get(n, ...) != v for o in others)}
    words = [short(n, v) for n, v in differ.items() if not n.endswith("_2")]  # those belong to the further channels, EXTRA
    mixed = len({"*bf16" in o.signature.values() for o in others}) > 1
    words += ["float32"] if mixed and "*bf16" not in kernel.signature.values() else []
    return ", ".join(words) + f"; {kernel.warps}" if words else f"{kernel.warps}"


def main() -> int:
    found: list[TritonKernel] = []
    for spec in kernels.iter_specs():
        found += [k for k in spec.kernels if k not in found]
    columns = " | ".join(f"sm_{c}" for c in ARCHITECTURES)
    page = HEAD.format(version=triton.__version__, columns=columns, lines="---|" * len(ARCHITECTURES))
    for kernel in found:
        others = [k for k in found if (k.module, k.name) == (kernel.module, kernel.name)]
        cells = [kernel.module.split(".")[0], f"`{kernel.name}`", variant(kernel, others)]
        page += "| " + " | ".join([*cells, *(resources(kernel, c) for c in ARCHITECTURES)]) + " |\n"
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
