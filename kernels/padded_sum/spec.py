"""Operator description of the sum with a border."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.padded_sum import reference


def _inputs(
    device: str, dtype: torch.dtype, *, shape: tuple[int, int, int, int], border: tuple[int, int] = (1, 1), residual: bool = True
) -> tuple:
    random = torch.Generator().manual_seed(0)
    x, other, fill = (torch.randn(s, generator=random) for s in (shape, shape if residual else (0,), shape[3:]))
    return *(t.to(device, dtype) for t in (x, other, fill)), *border


def _misfit(x: Tensor, residual: Tensor, fill: Tensor, before: int, after: int) -> str | None:
    if x.ndim != 4 or fill.shape != x.shape[3:] or residual.shape not in ((0,), x.shape):
        return "x and residual must have shape [N, H, W, C] and fill [C]; residual may be empty"
    return "a border has 0 or more pixels" if before < 0 or after < 0 else None


def _fake(x: Tensor, residual: Tensor, fill: Tensor, before: int, after: int) -> Tensor:
    reason = _misfit(x, residual, fill, before, after)
    torch._check(reason is None, lambda: str(reason))
    n, height, width, channels = x.shape
    return x.new_empty((n, before + height + after, before + width + after, channels))


def _supports(x: Tensor, residual: Tensor, fill: Tensor, before: int, after: int) -> str | None:
    if len({t.dtype for t in (x, residual, fill)}) > 1:
        return "different dtypes"
    if reason := _misfit(x, residual, fill, before, after):
        return reason
    if (before + x.shape[2] + after) * x.shape[3] > 2**30 or x.shape[0] * (before + x.shape[1] + after) > 2**30:
        return "more than 2^30 numbers in a row, or rows"
    return unsupported(x, residual, fill)


def _cost(x: Tensor, residual: Tensor, fill: Tensor, before: int, after: int) -> Cost:
    n, height, width, channels = x.shape
    out = n * (before + height + after) * (before + width + after) * channels
    return Cost(bytes=(x.numel() + residual.numel() + fill.numel() + out) * x.element_size(), flops=residual.numel())


def _eager(x: Tensor, residual: Tensor, fill: Tensor, before: int, after: int) -> Tensor:
    """What PyTorch pads with is one number: the sum less the fill, padded with zeros, plus the fill."""
    total = (x + residual if residual.numel() else x) - fill
    return torch.nn.functional.pad(total, (0, 0, before, after, before, after)) + fill


def _kernel(residual: bool, channels: int) -> TritonKernel:
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "fill_ptr", "out_ptr"), "*bf16")
    sizes = dict.fromkeys(("height", "width", "before", "after"), "i32")
    constants: dict[str, Any] = {"CHANNELS": channels, "HAS_RESIDUAL": residual, "BLOCK": 2048, "ONCE": False}
    return TritonKernel("padded_sum.triton", "padded_sum_kernel", {**pointers, **sizes}, constants, 8)


_CASES: dict[str, dict] = {
    "small": {"shape": (2, 3, 4, 8)},
    "odd": {"shape": (3, 5, 7, 11), "border": (1, 2)},
    "behind_only": {"shape": (2, 6, 5, 16), "border": (0, 1)},
    "no_border": {"shape": (2, 3, 5, 8), "border": (0, 0)},
    "without_residual": {"shape": (1, 4, 3, 24), "residual": False},
    "across_programs": {"shape": (1, 2, 300, 32), "border": (2, 1)},
    "no_images": {"shape": (0, 3, 4, 8)},
    "border_alone": {"shape": (2, 0, 3, 8)},
}
# before the VAE halves and doubles images, at its widest
_CLIPS: dict[str, dict] = {
    "16x320x512_halving": {"shape": (16, 320, 512, 128), "border": (0, 1)},
    "16x320x512_doubling": {"shape": (16, 160, 256, 256)},
    "25x576x1024_halving": {"shape": (13, 576, 1024, 128), "border": (0, 1)},
}

FORWARD = OpSpec(
    name="padded_sum",
    schema="(Tensor x, Tensor residual, Tensor fill, int before, int after) -> Tensor",
    reference=reference.padded_sum,
    fake=_fake,
    fast=launcher("padded_sum.triton", "padded_sum"),
    available=unavailable,
    supports=_supports,
    cases=tuple(Case(name, partial(_inputs, **given)) for name, given in _CASES.items()),
    benchmarks=tuple(Case(name, partial(_inputs, **given)) for name, given in _CLIPS.items()),
    tolerance=Tolerance(forward=0.0),
    cost=_cost,
    baselines={"eager": reference.padded_sum, "pad": _eager},
    kernels=tuple(_kernel(r, c) for r, c in ((True, 128), (False, 512), (True, 11))),
)

padded_sum_op = build_op(FORWARD)
SPECS = (FORWARD,)
