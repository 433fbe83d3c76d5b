"""Every Triton kernel compiles for every architecture we name, without a GPU and without spilling registers."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fvgen import kernels

triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")

KERNELS = [pytest.param(k, id=f"{k.name}-{i}") for s in kernels.iter_specs() for i, k in enumerate(s.kernels)]


def resource_usage(cubin: bytes, folder: Path) -> dict[str, int]:
    """Registers, stack, shared and local bytes as ``cuobjdump`` reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton brings no cuobjdump")
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    text = subprocess.run([tool, "--dump-resource-usage", file], check=True, capture_output=True, text=True).stdout
    pairs = [word.split(":") for line in text.splitlines() if "REG:" in line for word in line.split()]
    return {name: int(value) for name, value, *_ in pairs if value.isdigit()}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_without_spilling(kernel, capability, tmp_path):
    usage = resource_usage(kernel.compile(capability).asm["cubin"], tmp_path)
    assert usage["REG"] <= 255
    assert usage["STACK"] == 0
    assert usage["LOCAL"] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_for_sizes_of_one(kernel):
    """Triton turns an integer argument that equals 1 into a constant, which has fewer methods than a number."""
    sizes = [name for name, kind in kernel.signature.items() if kind in ("i32", "i64")]
    for ones in (*([name] for name in sizes), sizes):
        signature = {name: kind for name, kind in kernel.signature.items() if name not in ones}
        constants = {**kernel.constants, **dict.fromkeys(ones, 1)}
        replace(kernel, signature=signature, constants=constants).compile(90)
