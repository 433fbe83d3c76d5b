"""Operator descriptions of the layer normalisation with residual and its backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, column_sums_kernel, launcher, unavailable, unsupported
from fvgen.kernels.layer_norm_residual import reference


def _inputs(device: str, dtype: torch.dtype, *, shape: tuple[int, int], residual: bool = True) -> tuple:
    random = torch.Generator().manual_seed(0)
    draws = (torch.randn(s, generator=random, dtype=torch.float64) for s in (shape, shape, shape[1:], shape[1:]))
    x, added, weight, bias = (draw.to(device, dtype) for draw in draws)
    return 2 * x + 0.5, added if residual else x.new_empty(0), 1 + 0.3 * weight, 0.3 * bias, 1e-5


def _gradients(device: str, dtype: torch.dtype, *, shape: tuple[int, int], residual: bool = True) -> tuple:
    x, added, weight, bias, eps = _inputs(device, dtype, shape=shape, residual=residual)
    _, _, mean, rstd = reference.layer_norm_residual(x, x.new_empty(0), weight, bias, eps)
    return x.flip(0).contiguous(), added, x, weight, mean, rstd


def _fake(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple:
    torch._check(x.ndim == 2, lambda: "x must have shape [M, C]")
    torch._check(weight.shape == x.shape[1:] and bias.shape == x.shape[1:], lambda: "weight and bias must have shape [C]")
    mean = x.new_empty(x.shape[:1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), torch.empty_like(residual), mean, torch.empty_like(mean)


def _fake_backward(grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, *_: object) -> tuple:
    return torch.empty_like(total), torch.empty_like(weight), torch.empty_like(weight)


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, _, _ = inputs
    _, total, mean, rstd = output
    ctx.has_residual = residual.numel() > 0
    ctx.residual_shape = residual.shape
    ctx.save_for_backward(total if ctx.has_residual else x, weight, mean, rstd)
    ctx.mark_non_differentiable(*(output[2:] if ctx.has_residual else output[1:]))


def _backward(ctx: Any, grad: Tensor, grad_total: Tensor, *_: object) -> tuple:
    after = grad_total.contiguous() if ctx.has_residual else grad.new_empty(0)
    grad_x, grad_weight, grad_bias = layer_norm_residual_backward_op(grad.contiguous(), after, *ctx.saved_tensors)
    return grad_x, grad_x if ctx.has_residual else grad.new_empty(ctx.residual_shape), grad_weight, grad_bias, None


def _supports(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> str | None:
    return _too_wide(x) or unsupported(x, residual, weight, bias)


def _supports_backward(grad: Tensor, grad_total: Tensor, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> str | None:
    return _too_wide(total) or unsupported(grad, grad_total, total, weight) or unsupported(mean, rstd, dtypes=(torch.float32,))


def _too_wide(x: Tensor) -> str | None:
    most = reference.MOST_CHANNELS
    return f"more than {most} channels" if x.shape[1] > most else None


def _cost(x: Tensor, residual: Tensor, *_: object) -> Cost:
    return Cost(bytes=(2 * x.numel() + 2 * residual.numel()) * x.element_size(), flops=9 * x.numel())


def _backward_cost(grad: Tensor, grad_total: Tensor, *_: object) -> Cost:
    return Cost(bytes=(3 * grad.numel() + grad_total.numel()) * grad.element_size(), flops=14 * grad.numel())


def _library(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual if residual.numel() else x
    return torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, eps), total


_TYPES = {
    **dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "out_ptr", "total_ptr", "grad_ptr"), "*bf16"),
    "grad_total_ptr": "*bf16",
    **dict.fromkeys(("mean_ptr", "rstd_ptr", "partial_ptr"), "*fp32"),
    **dict.fromkeys(("rows", "channels", "programs", "steps"), "i32"),
    "eps": "fp32",
}


def _kernel(name: str, arguments: str, tile: dict[str, int], warps: int = 4) -> TritonKernel:
    signature = {n: _TYPES[n] for n in arguments.split()}
    return TritonKernel("layer_norm_residual.triton", name, signature, {"HAS_RESIDUAL": True, **tile}, warps)


_SHAPES = {
    "16x320x512_320": (16 * 40 * 64, 320),
    "16x320x512_1280": (16 * 10 * 16, 1280),
    "25x576x1024_320": (25 * 72 * 128, 320),
}
_ODD: dict[str, dict] = {
    "odd": {"shape": (67, 129)},
    "across_programs": {"shape": (1031, 40), "residual": False},
    "widest": {"shape": (5, 2048)},
    "empty": {"shape": (0, 8)},
}
FORWARD = OpSpec(
    name="layer_norm_residual",
    schema="(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_residual,
    fake=_fake,
    fast=launcher("layer_norm_residual.triton", "layer_norm_residual"),
    available=unavailable,
    supports=_supports,
    setup_context=_context,
    backward=_backward,
    grad_args=(0, 1, 2, 3),
    cases=(
        Case("small", partial(_inputs, shape=(3, 5)), gradcheck=True),
        Case("without_residual", partial(_inputs, shape=(4, 7), residual=False), gradcheck=True),
        *(Case(name, partial(_inputs, **given)) for name, given in _ODD.items()),
        # its gradient is zero: nothing but rounding to compare
        Case("one_channel", partial(_inputs, shape=(9, 1), residual=False), differentiable=False),
    ),
    benchmarks=tuple(Case(name, partial(_inputs, shape=shape)) for name, shape in _SHAPES.items()),
    tolerance=Tolerance(forward=1e-5, backward=2e-5),
    cost=_cost,
    baselines={"eager": reference.layer_norm_residual, "library": _library},
    kernels=tuple(  # for 320 and 1280 channels, rounded up to a power of two
        _kernel(
            "layer_norm_kernel",
            "x_ptr residual_ptr weight_ptr bias_ptr out_ptr total_ptr mean_ptr rstd_ptr eps rows channels",
            {"BLOCK_R": rows, "BLOCK_C": c, "ONCE": False},
            warps,
        )
        for c, rows, warps in ((512, 2, 1), (2048, 2, 4))
    ),
)
BACKWARD = OpSpec(
    name="layer_norm_residual_backward",
    schema="(Tensor grad, Tensor grad_total, Tensor total, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_residual_backward,
    fake=_fake_backward,
    fast=launcher("layer_norm_residual.triton", "layer_norm_residual_backward"),
    available=unavailable,
    supports=_supports_backward,
    cases=(
        Case("small", partial(_gradients, shape=(3, 5))),
        Case("without_residual", partial(_gradients, shape=(4, 7), residual=False)),
        *(Case(name, partial(_gradients, **given)) for name, given in _ODD.items()),
    ),
    benchmarks=tuple(Case(name, partial(_gradients, shape=shape)) for name, shape in _SHAPES.items()),
    tolerance=Tolerance(forward=2e-5),
    cost=_backward_cost,
    baselines={"eager": reference.layer_norm_residual_backward},
    kernels=(
        *(
            _kernel(
                "layer_norm_backward_kernel",
                "grad_ptr grad_total_ptr total_ptr weight_ptr mean_ptr rstd_ptr out_ptr partial_ptr rows channels programs steps",
                {"HALVES": halves, "BLOCK_R": 256 * warps // c, "BLOCK_C": c},
                warps,
            )
            for halves, c, warps in ((False, 64, 1), (True, 256, 1), (True, 1024, 4))  # 64, 320 and 1280 channels
        ),
        column_sums_kernel("*bf16"),
    ),
)

layer_norm_residual_backward_op = build_op(BACKWARD)
layer_norm_residual_op = build_op(FORWARD)
SPECS = (FORWARD, BACKWARD)
