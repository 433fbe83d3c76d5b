"""Operator descriptions of the temporal convolution, its backward pass and its variant with statistics."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.temporal_conv import reference


def _inputs(
    device: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int, int],
    channels: int,
    bias: bool = True,
    residual: bool = False,
) -> tuple:
    """x of the given shape, and a weight that makes the output about as large as x."""
    random = torch.Generator().manual_seed(0)
    shapes = (shape, (3, channels, shape[3]), (channels if bias else 0,), (*shape[:3], channels) if residual else (0,))
    x, weight, added, other = (torch.randn(s, generator=random) for s in shapes)
    return tuple(t.to(device, dtype) for t in (x, weight / math.sqrt(max(3 * shape[3], 1)), 0.3 * added, other))


def _gradients(device: str, dtype: torch.dtype, *, shape: tuple[int, int, int, int], channels: int, **_: bool) -> tuple:
    grad = torch.randn((*shape[:3], channels), generator=torch.Generator().manual_seed(1))
    return grad.to(device, dtype), *_inputs(device, dtype, shape=shape, channels=channels)[:2]


def _without_residual(device: str, dtype: torch.dtype, **given: Any) -> tuple:
    return _inputs(device, dtype, **given)[:3]


def _misfit(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> str | None:
    if x.ndim != 4 or weight.ndim != 3 or weight.shape[0] != 3 or weight.shape[2] != x.shape[3]:
        return "x must have shape [B, T, S, C] and weight [3, O, C]"
    if bias is not None and bias.shape not in ((0,), weight.shape[1:2]):
        return "bias must have shape [O] or be empty"
    if residual is not None and residual.shape not in ((0,), (*x.shape[:3], weight.shape[1])):
        return "residual must have shape [B, T, S, O] or be empty"
    return None


def _fake(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    reason = _misfit(x, weight, bias, residual)
    torch._check(reason is None, lambda: str(reason))
    return x.new_empty((*x.shape[:3], weight.shape[1]))


def _fake_statistics(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    out = _fake(x, weight, bias, x.new_empty(0))
    shape = (x.shape[0], -(-(x.shape[1] * x.shape[2]) // reference.ROWS), 2, weight.shape[1])
    return out, x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(weight.shape[1])


def _supports(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> str | None:
    tensors = [t for t in (x, weight, bias, residual) if t is not None]
    if len({t.dtype for t in tensors}) > 1:
        return "different dtypes"
    if _misfit(x, weight, bias, residual):
        return "shapes that do not fit together"
    return "2^31 rows in a clip" if x.shape[1] * x.shape[2] > 2**31 - 2**9 else unsupported(*tensors)


def _supports_backward(grad: Tensor, x: Tensor, weight: Tensor) -> str | None:
    if grad.dtype != x.dtype or x.ndim != 4 or grad.shape[:3] != x.shape[:3]:
        return "a gradient that does not fit"
    return _supports(x, weight, weight.new_empty(0)) or unsupported(grad)


def _context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, residual = inputs
    ctx.absent = bias.numel() == 0, residual.shape if residual.numel() == 0 else None
    ctx.bias_shape = bias.shape
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    no_bias, no_residual = ctx.absent
    grad_x, grad_weight, grad_bias = temporal_conv_backward_op(grad.contiguous(), *ctx.saved_tensors)
    return (
        grad_x,
        grad_weight,
        grad.new_empty(ctx.bias_shape) if no_bias else grad_bias,
        grad if no_residual is None else grad.new_empty(no_residual),
    )


def _products(x: Tensor, weight: Tensor) -> int:
    """Operations of the products with frames that exist."""
    clips, frames, sites, inner = x.shape
    return 2 * clips * max(3 * frames - 2, 0) * sites * inner * weight.shape[1]


def _cost(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Cost:
    out = math.prod(x.shape[:3]) * weight.shape[1]
    elements = x.numel() + weight.numel() + bias.numel() + (0 if residual is None else residual.numel()) + out
    return Cost(bytes=elements * x.element_size(), flops=_products(x, weight))


def _backward_cost(grad: Tensor, x: Tensor, weight: Tensor) -> Cost:
    elements = grad.numel() + 2 * (x.numel() + weight.numel())
    return Cost(bytes=elements * x.element_size(), flops=2 * _products(x, weight))


def _statistics_apart(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN, then a pass for the statistics, where the rows divide into blocks."""
    out = reference.cudnn(x, weight, bias, x.new_empty(0))
    blocks = out.float().view(x.shape[0], -1, reference.ROWS, out.shape[3])
    variance, mean = torch.var_mean(blocks, 2, correction=0)
    return out, torch.stack([mean, variance * reference.ROWS], 2)


def _descriptor_kernel(
    m: int, n: int, extra: int, k: int, warps: int, stages: int, *, persistent: bool = False, residual: bool, statistics: bool
) -> TritonKernel:
    """For tiles as in ``triton.Tiles``; a tensor that is left out is None, hence a constant."""
    types = {"x_desc": f"tensordesc<bf16[1, {m}, {k}]>", "bias_ptr": "*bf16"}
    types |= dict.fromkeys(("clips", "rows", "sites", "channels", "inner"), "i32")
    constants: dict[str, Any] = {"BLOCK_M": m, "BLOCK_N": n, "EXTRA": extra, "BLOCK_K": k, "GROUP_M": 8}
    constants |= {"PERSISTENT": persistent, "ROWS": reference.ROWS}
    optional = {"partial_ptr": "*fp32" if statistics else None}
    for suffix, width in (("", n), ("_2", extra)):
        tile = f"tensordesc<bf16[1, {m}, {width}]>" if width else None
        optional |= {f"out_desc{suffix}": tile, f"residual_desc{suffix}": tile if residual else None}
        optional[f"weight_desc{suffix}"] = f"tensordesc<bf16[{width}, {k}]>" if width else None
    types |= {name: kind for name, kind in optional.items() if kind}
    constants |= {name: None for name, kind in optional.items() if not kind}
    return TritonKernel("temporal_conv.triton", "descriptor_kernel", types, constants, warps, stages, 90)


def _pointer_kernel(dtype: str, m: int, n: int, k: int, warps: int, stages: int) -> TritonKernel:
    types = {**dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "out_ptr"), dtype), "partial_ptr": "*fp32"}
    types |= dict.fromkeys(("clips", "rows", "sites", "channels", "inner"), "i32")
    constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "ROWS": reference.ROWS}
    return TritonKernel("temporal_conv.triton", "pointer_kernel", types, constants, warps, stages)


# one clip, [B, T, sites, width] of the network's levels
_CLIPS: dict[str, dict] = {
    f"{clip}_{sites}x{width}": {"shape": (1, frames, sites, width), "channels": width}
    for clip, frames, levels in (
        ("16x320x512", 16, ((40 * 64, 320), (20 * 32, 640), (10 * 16, 1280), (5 * 8, 1280))),
        ("25x576x1024", 25, ((72 * 128, 320), (36 * 64, 640), (18 * 32, 1280), (9 * 16, 1280))),
    )
    for sites, width in levels
}
_SMOOTH: dict[str, dict] = {
    "small": {"shape": (2, 3, 2, 3), "channels": 2, "residual": True},
    "one_frame": {"shape": (1, 1, 3, 2), "channels": 3},
    "without_bias": {"shape": (1, 4, 1, 2), "channels": 1, "bias": False},
    "residual_alone": {"shape": (1, 2, 2, 1), "channels": 2, "bias": False, "residual": True},
}
_ODD: dict[str, dict] = {
    "two_frames": {"shape": (3, 2, 5, 7), "channels": 5},
    "across_programs": {"shape": (2, 5, 37, 43), "channels": 67, "residual": True},
    "across_clips": {"shape": (3, 4, 70, 40), "channels": 72},
    "aligned": {"shape": (2, 3, 128, 72), "channels": 40, "residual": True},
    "no_clips": {"shape": (0, 3, 4, 8), "channels": 4, "residual": True},
    "no_frames": {"shape": (2, 0, 4, 8), "channels": 4},
    "no_sites": {"shape": (2, 3, 0, 8), "channels": 4},
    "no_inner": {"shape": (1, 2, 3, 0), "channels": 4},
    "no_channels": {"shape": (1, 2, 3, 4), "channels": 0},
}
_ALL = {**_SMOOTH, **_ODD}
FORWARD = OpSpec(
    name="temporal_conv",
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor residual) -> Tensor",
    reference=reference.temporal_conv,
    fake=_fake,
    fast=launcher("temporal_conv.triton", "temporal_conv"),
    available=unavailable,
    supports=_supports,
    setup_context=_context,
    backward=_backward,
    grad_args=(0, 1, 2, 3),
    cases=tuple(Case(name, partial(_inputs, **given), gradcheck=name in _SMOOTH) for name, given in _ALL.items()),
    benchmarks=tuple(Case(name, partial(_inputs, **given)) for name, given in _CLIPS.items()),
    tolerance=Tolerance(forward=2e-6, backward=1e-5),
    cost=_cost,
    baselines={"eager": reference.temporal_conv, "cudnn": reference.cudnn},
    kernels=(
        _descriptor_kernel(128, 128, 32, 64, 8, 3, residual=True, statistics=False),
        _descriptor_kernel(128, 256, 0, 64, 8, 3, residual=True, statistics=False),
        _descriptor_kernel(128, 256, 64, 64, 8, 3, residual=True, statistics=False),
        _descriptor_kernel(128, 128, 32, 64, 4, 3, residual=True, statistics=False),
        _descriptor_kernel(64, 64, 0, 64, 4, 4, residual=True, statistics=False),
        _descriptor_kernel(64, 64, 0, 128, 4, 3, residual=True, statistics=False),
        _descriptor_kernel(128, 128, 0, 64, 8, 3, persistent=True, residual=False, statistics=False),
        _pointer_kernel("*bf16", 128, 64, 32, 8, 3),
        _pointer_kernel("*fp32", 128, 32, 32, 8, 2),
    ),
)
STATISTICS = OpSpec(
    name="temporal_conv_statistics",
    schema="(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    reference=reference.temporal_conv_statistics,
    fake=_fake_statistics,
    fast=launcher("temporal_conv.triton", "temporal_conv_statistics"),
    available=unavailable,
    supports=_supports,
    cases=tuple(Case(name, partial(_without_residual, **given)) for name, given in _ALL.items()),
    benchmarks=tuple(
        Case(name, partial(_without_residual, **given))
        for name, given in _CLIPS.items()
        if given["shape"][1] * given["shape"][2] % reference.ROWS == 0
    ),
    tolerance=Tolerance(forward=5e-6),
    cost=_cost,
    baselines={"eager": reference.temporal_conv_statistics, "cudnn": _statistics_apart},
    kernels=(
        _descriptor_kernel(128, 128, 32, 64, 8, 3, residual=False, statistics=True),
        _descriptor_kernel(128, 256, 64, 64, 8, 3, residual=False, statistics=True),
        _descriptor_kernel(128, 128, 32, 64, 4, 3, residual=False, statistics=True),
        _descriptor_kernel(128, 128, 0, 64, 4, 3, residual=False, statistics=True),
        _descriptor_kernel(128, 64, 0, 64, 4, 4, residual=False, statistics=True),
    ),
)
BACKWARD = OpSpec(
    name="temporal_conv_backward",
    schema="(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)",
    reference=reference.temporal_conv_backward,
    fake=_fake_backward,
    fast=launcher("temporal_conv.triton", "temporal_conv_backward"),
    available=unavailable,
    supports=_supports_backward,
    cases=tuple(Case(name, partial(_gradients, **given)) for name, given in _ALL.items()),
    benchmarks=tuple(Case(name, partial(_gradients, **given)) for name, given in _CLIPS.items()),
    tolerance=Tolerance(forward=1e-5),
    cost=_backward_cost,
    baselines={"eager": reference.temporal_conv_backward},
)

temporal_conv_backward_op = build_op(BACKWARD)
temporal_conv_statistics_op = build_op(STATISTICS)
temporal_conv_op = build_op(FORWARD)
SPECS = (FORWARD, STATISTICS, BACKWARD)
