"""What Triton kernels share: when they can run, lazy launchers, and compilation without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def unavailable() -> str | None:
    """Why Triton kernels cannot run on this machine, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def launcher(module: str, name: str) -> Callable[..., Any]:
    """Function ``name`` of ``fvgen.kernels.<module>``, imported at its first call: a machine without Triton never needs it."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"fvgen.kernels.{module}"), name)(*args)

    return launch


def unsupported(*tensors: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)) -> str | None:
    """Why these tensors cannot go to a kernel, None if they can."""
    for x in tensors:
        if x.dtype not in dtypes:
            return f"dtype {x.dtype}"
        if not x.is_contiguous():
            return "a tensor that is not contiguous"
    return None


def compile_side_by_side(call: Callable[[], Any]) -> None:
    """Compiles the kernels that ``call`` launches, on all processor cores at once; they do not run, and its results mean nothing.

    A kernel that cannot be compiled is left to its launch, which says why.
    """
    if unavailable() is not None:
        return
    from triton import AsyncCompileMode
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    with ThreadPoolExecutor() as pool, AsyncCompileMode(pool, ignore_errors=True):
        JITFunction.run = compile_only
        try:
            call()
        finally:
            JITFunction.run = run


@dataclass(frozen=True)
class TritonKernel:
    """A kernel as it is compiled ahead of time, to see that it builds for every architecture without spilling.

    Attributes:
        module: below ``fvgen.kernels``; name: of the jitted function.
        signature: argument name -> Triton type such as ``"*bf16"``, ``"i32"``; constants: the constexpr arguments.
        warps: per program; stages: of the software pipeline, None for Triton's default.
        least: the oldest architecture that has what the kernel uses; it is compiled for this one instead of an older one.
        multiples: integer arguments that are multiples of 16, which Triton finds out at a launch; the others are odd.
    """

    module: str
    name: str
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int | None = None
    least: int = 80
    multiples: tuple[str, ...] = ()

    def compile(self, capability: int) -> Any:
        """The compiled kernel for ``sm_<capability>``; needs Triton, but no GPU."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        function = getattr(importlib.import_module(f"fvgen.kernels.{self.module}"), self.name)
        signature = {**self.signature, **dict.fromkeys(self.constants, "constexpr")}
        # tensors begin at multiples of 16 bytes, as at a launch: otherwise every element would be loaded on its own
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, n in enumerate(function.arg_names)
            if signature[n].startswith("*") or (n in self.multiples and signature[n] != "constexpr")
        }
        source = ASTSource(function, {n: signature[n] for n in function.arg_names}, self.constants, aligned)
        options = {"num_warps": self.warps, **({} if self.stages is None else {"num_stages": self.stages})}
        return triton.compile(source, target=GPUTarget("cuda", max(capability, self.least), 32), options=options)


def column_sums_kernel(kind: str, third: bool = False) -> TritonKernel:
    """The sums at the end of a backward pass, for weights of this Triton type."""
    outputs = dict.fromkeys(("first_ptr", "second_ptr", "third_ptr"), kind)
    signature = {"partial_ptr": "*fp32", **outputs, "rows": "i32", "channels": "i32"}
    return TritonKernel("_triton_sums", "column_sums_kernel", signature, {"THIRD": third, "BLOCK_R": 256, "BLOCK_C": 16}, warps=8)
