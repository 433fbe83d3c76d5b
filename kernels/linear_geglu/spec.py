"""Operator descriptions of the linear layer with GEGLU and its backward pass."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.geglu.spec import geglu_op
from fvgen.kernels.linear_geglu import reference


def _inputs(device: str, dtype: torch.dtype, *, shape: tuple[int, ...], channels: int, factor: float = 1.0) -> tuple:
    """x of the given shape, and weight and bias that make value and gate of about the same size as ``factor``."""
    random = torch.Generator().manual_seed(0)
    shapes = (shape, (2 * channels, shape[-1]), (2 * channels,))
    x, weight, bias = (torch.randn(s, generator=random) for s in shapes)
    scaled = (factor * x, weight / math.sqrt(max(shape[-1], 1)), 0.3 * bias)
    return tuple(t.to(device, dtype) for t in scaled)


def _gradients(device: str, dtype: torch.dtype, *, shape: tuple[int, ...], channels: int, factor: float = 1.0) -> tuple:
    grad = torch.randn((*shape[:-1], channels), generator=torch.Generator().manual_seed(1))
    return grad.to(device, dtype), *_inputs(device, dtype, shape=shape, channels=channels, factor=factor)


def _fake(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    fits = x.ndim >= 1 and weight.ndim == 2 and weight.shape[0] % 2 == 0
    torch._check(fits, lambda: "x must have shape [..., K] and weight an even number of rows [2 C, K]")
    torch._check(weight.shape[1] == x.shape[-1], lambda: "x [..., K] and weight [2 C, K] must have the same K")
    torch._check(bias.shape == weight.shape[:1], lambda: "bias must have shape [2 C]")
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (x, weight, bias))


def _supports(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[0] % 2 or weight.shape[1] != x.shape[-1] or bias.shape != weight.shape[:1]:
        return "shapes that do not fit together"
    if not x.dtype == weight.dtype == bias.dtype:
        return "different dtypes"
    return unsupported(x, weight, bias)


def _supports_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if grad.shape != (*x.shape[:-1], weight.shape[0] // 2):
        return "shapes that do not fit together"
    return _supports(x, weight, bias) or unsupported(grad, dtypes=(x.dtype,))


def _context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return linear_geglu_backward_op(grad.contiguous(), *ctx.saved_tensors)


def _products(x: Tensor, weight: Tensor) -> int:
    """Operations of x W^T."""
    return 2 * math.prod(x.shape[:-1]) * weight.numel()


def _cost(x: Tensor, weight: Tensor, bias: Tensor) -> Cost:
    elements = x.numel() + weight.numel() + bias.numel() + math.prod(x.shape[:-1]) * weight.shape[0] // 2
    return Cost(bytes=elements * x.element_size(), flops=_products(x, weight))


def _backward_cost(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Cost:
    elements = grad.numel() + 2 * (x.numel() + weight.numel() + bias.numel())
    return Cost(bytes=elements * x.element_size(), flops=3 * _products(x, weight))


def _linear_then_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return geglu_op(functional.linear(x, weight, bias))


# one clip, [tokens, width] of the network's levels; value and gate have 4 x width channels each
_CLIPS = {
    f"{clip}_width{width}": {"shape": (rows, width), "channels": 4 * width}
    for clip, levels in {
        "16x320x512": ((16 * 40 * 64, 320), (16 * 20 * 32, 640), (16 * 10 * 16, 1280), (16 * 5 * 8, 1280)),
        "25x576x1024": ((25 * 72 * 128, 320), (25 * 36 * 64, 640), (25 * 18 * 32, 1280)),
    }.items()
    for rows, width in levels
}
_SMOOTH: dict[str, dict] = {
    "small": {"shape": (2, 3, 5), "channels": 3},
    "vector": {"shape": (6,), "channels": 2},
}
_ODD: dict[str, dict] = {
    "odd": {"shape": (3, 7, 21), "channels": 33},
    "across_programs": {"shape": (131, 43), "channels": 67},
    "aligned": {"shape": (2, 70, 72), "channels": 72},
    "tails": {"shape": (3, 20), "channels": 8, "factor": 20.0},
    "no_rows": {"shape": (0, 8), "channels": 4},
    "no_channels": {"shape": (4, 8), "channels": 0},
    "no_inner": {"shape": (4, 0), "channels": 3},
}


def _kernels() -> tuple[TritonKernel, ...]:
    sizes = dict.fromkeys(("rows", "channels", "inner"), "i32")
    found = []
    for tiles in ((128, 64, 64, 4, 3, False), (128, 64, 64, 4, 3, True), (128, 128, 64, 8, 3, False), (128, 128, 64, 8, 3, True)):
        m, n, k, warps, stages, persistent = tiles
        types = {
            "x_desc": f"tensordesc<bf16[{m}, {k}]>",
            "weight_desc": f"tensordesc<bf16[2, {n}, {k}]>",
            "bias_ptr": "*bf16",
            "out_desc": f"tensordesc<bf16[{m}, {n}]>",
        }
        blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}
        form = {"PERSISTENT": persistent, "EXACT": False}
        found.append(
            TritonKernel("linear_geglu.triton", "descriptor_kernel", {**types, **sizes}, {**blocks, **form}, warps, stages, 90)
        )
    for dtype, (m, n, k), stages in (("*bf16", (128, 64, 32), 3), ("*fp32", (64, 32, 32), 2)):
        types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "out_ptr"), dtype)
        constants = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "EXACT": dtype == "*fp32"}
        found.append(TritonKernel("linear_geglu.triton", "pointer_kernel", {**types, **sizes}, constants, 8, stages))
    return tuple(found)


FORWARD = OpSpec(
    name="linear_geglu",
    schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    reference=reference.linear_geglu,
    fake=_fake,
    fast=launcher("linear_geglu.triton", "linear_geglu"),
    available=unavailable,
    supports=_supports,
    setup_context=_context,
    backward=_backward,
    grad_args=(0, 1, 2),
    cases=(
        *(Case(name, partial(_inputs, **given), gradcheck=True) for name, given in _SMOOTH.items()),
        *(Case(name, partial(_inputs, **given)) for name, given in _ODD.items()),
    ),
    benchmarks=tuple(Case(name, partial(_inputs, **given)) for name, given in _CLIPS.items()),
    tolerance=Tolerance(forward=1e-5, backward=1e-5),
    cost=_cost,
    baselines={"eager": reference.eager, "linear_then_geglu": _linear_then_geglu},
    kernels=_kernels(),
)
BACKWARD = OpSpec(
    name="linear_geglu_backward",
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)",
    reference=reference.linear_geglu_backward,
    fake=_fake_backward,
    fast=launcher("linear_geglu.triton", "linear_geglu_backward"),
    available=unavailable,
    supports=_supports_backward,
    cases=tuple(Case(name, partial(_gradients, **given)) for name, given in {**_SMOOTH, **_ODD}.items()),
    benchmarks=tuple(Case(name, partial(_gradients, **given)) for name, given in _CLIPS.items()),
    tolerance=Tolerance(forward=1e-5),
    cost=_backward_cost,
    baselines={"eager": reference.eager_backward},
)

linear_geglu_backward_op = build_op(BACKWARD)
linear_geglu_op = build_op(FORWARD)
SPECS = (FORWARD, BACKWARD)
