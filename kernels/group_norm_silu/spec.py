"""Operator descriptions of the group normalisation and its backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.group_norm_silu import reference


def _inputs(
    device: str, dtype: torch.dtype, *, shape: tuple[int, int, int], groups: int, emb: bool = True, silu: bool = True
) -> tuple:
    random = torch.Generator().manual_seed(0)
    n, _, channels = shape
    draws = (torch.randn(s, generator=random, dtype=torch.float64) for s in (shape, (channels,), (channels,), (n, channels)))
    x, weight, bias, added = (draw.to(device, dtype) for draw in draws)
    return 2 * x + 0.5, 1 + 0.3 * weight, 0.3 * bias, added if emb else x.new_empty(0), groups, 1e-5, silu


def _gradients(device: str, dtype: torch.dtype, **shape: Any) -> tuple:
    x, weight, bias, emb, groups, eps, silu = _inputs(device, dtype, **shape)
    _, mean, rstd = reference.group_norm_silu(x, weight, bias, emb, groups, eps, silu)
    return x.flip(1).contiguous(), x, weight, bias, emb, mean, rstd, groups, silu


def _fake(x: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool) -> tuple:
    torch._check(x.ndim == 3, lambda: "x must have shape [N, R, C]")
    torch._check(x.shape[2] % groups == 0, lambda: "groups must divide the channels of x [N, R, C]")
    torch._check(weight.shape == x.shape[2:] and bias.shape == x.shape[2:], lambda: "weight and bias must have shape [C]")
    statistics = x.new_empty((x.shape[0], groups), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, *_: object) -> tuple:
    return tuple(torch.empty_like(t) for t in (x, weight, bias, emb))


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, emb, ctx.groups, _, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, emb, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: object) -> tuple:
    return *group_norm_silu_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.groups, ctx.silu), None, None, None


def _cost(x: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool) -> Cost:
    # x is read twice, or once where a group fits into registers
    passes = 2 if reference.is_small(x.shape[1], x.shape[2] // groups) else 3
    return Cost(bytes=passes * x.numel() * x.element_size(), flops=(8 + 5 * silu) * x.numel())


def _backward_cost(grad: Tensor, x: Tensor, *rest: Any) -> Cost:
    return Cost(bytes=5 * x.numel() * x.element_size(), flops=(14 + 10 * rest[-1]) * x.numel())


def _library(x: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool) -> Tensor:
    rows = x + emb[:, None] if emb.numel() else x
    out = torch.nn.functional.group_norm(rows.transpose(1, 2), groups, weight, bias, eps)
    return (torch.nn.functional.silu(out) if silu else out).transpose(1, 2)


_TYPES = {
    **dict.fromkeys(("grad_ptr", "x_ptr", "emb_ptr", "weight_ptr", "bias_ptr", "out_ptr", "grad_emb_ptr"), "*bf16"),
    **dict.fromkeys(("partial_ptr", "mean_ptr", "rstd_ptr", "means_ptr", "sums_ptr"), "*fp32"),
    **dict.fromkeys(("rows", "channels", "groups", "programs", "samples"), "i32"),
    "eps": "fp32",
}
_TILE = {"HAS_EMB": True, "ROWS": 128, "BLOCK_R": 32, "BLOCK_C": 64}
_AFFINE = "x_ptr emb_ptr weight_ptr bias_ptr mean_ptr rstd_ptr"
_SIZES = "rows channels groups"
_WIDTHS = (16, 64)  # 320 and 1280 channels in 32 groups: 10 and 40, rounded up to a power of two


def _kernel(name: str, arguments: str, constants: dict, warps: int = 4) -> TritonKernel:
    return TritonKernel("group_norm_silu.triton", name, {n: _TYPES[n] for n in arguments.split()}, constants, warps)


_SHAPES: dict[str, dict] = {
    "frames_16x320x512_320": {"shape": (16, 40 * 64, 320)},
    "clip_16x320x512_320": {"shape": (1, 16 * 40 * 64, 320)},
    "frames_16x320x512_1280": {"shape": (16, 5 * 8, 1280)},
    "frames_25x576x1024_320": {"shape": (25, 72 * 128, 320)},
}
_BENCHMARKS = {name: {**given, "groups": 32} for name, given in _SHAPES.items()}
_ODD: dict[str, dict] = {
    "joint": {"shape": (1, 263, 40), "groups": 5, "emb": False},
    "plain": {"shape": (3, 130, 32), "groups": 8, "emb": False, "silu": False},
    "across_programs": {"shape": (2, 1031, 40), "groups": 4},
    "wide": {"shape": (2, 150, 132), "groups": 1, "silu": False},
    "empty": {"shape": (0, 5, 8), "groups": 2},
}
FORWARD = OpSpec(
    name="group_norm_silu",
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor emb, int groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
    reference=reference.group_norm_silu,
    fake=_fake,
    fast=launcher("group_norm_silu.triton", "group_norm_silu"),
    available=unavailable,
    supports=lambda x, weight, bias, emb, *_: unsupported(x, weight, bias, emb),
    setup_context=_context,
    backward=_backward,
    grad_args=(0, 1, 2, 3),
    cases=(
        Case("small", partial(_inputs, shape=(2, 3, 6), groups=3), gradcheck=True),
        Case("without_emb", partial(_inputs, shape=(2, 7, 4), groups=2, emb=False), gradcheck=True),
        Case("without_silu", partial(_inputs, shape=(3, 1, 10), groups=2, silu=False), gradcheck=True),
        *(Case(name, partial(_inputs, **given)) for name, given in _ODD.items()),
    ),
    benchmarks=tuple(Case(name, partial(_inputs, **given)) for name, given in _BENCHMARKS.items()),
    tolerance=Tolerance(forward=1e-5, backward=2e-5),
    cost=_cost,
    baselines={"eager": reference.group_norm_silu, "library": _library},
    kernels=(
        _kernel("statistics_kernel", "x_ptr emb_ptr partial_ptr rows channels programs", _TILE),
        *(
            _kernel(
                "combine_kernel",
                f"partial_ptr mean_ptr rstd_ptr eps {_SIZES} programs",
                {"ROWS": 128, "BLOCK_P": 1024 // j, "BLOCK_J": j},
            )
            for j in _WIDTHS
        ),
        _kernel("normalise_kernel", f"{_AFFINE} out_ptr {_SIZES} programs", {**_TILE, "SILU": True}),
        *(
            _kernel(
                "small_kernel",
                f"{_AFFINE} out_ptr eps {_SIZES}",
                {"HAS_EMB": True, "SILU": True, "BLOCK_R": reference.SMALL // j, "BLOCK_J": j},
                warps=8,
            )
            for j in _WIDTHS
        ),
    ),
)
BACKWARD = OpSpec(
    name="group_norm_silu_backward",
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor emb, Tensor mean, Tensor rstd, int groups, bool silu)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.group_norm_silu_backward,
    fake=_fake_backward,
    fast=launcher("group_norm_silu.triton", "group_norm_silu_backward"),
    available=unavailable,
    supports=lambda grad, x, weight, bias, emb, mean, rstd, *_: (
        unsupported(grad, x, weight, bias, emb) or unsupported(mean, rstd, dtypes=(torch.float32,))
    ),
    cases=(
        Case("small", partial(_gradients, shape=(2, 3, 6), groups=3)),
        Case("without_emb", partial(_gradients, shape=(2, 7, 4), groups=2, emb=False)),
        *(Case(name, partial(_gradients, **given)) for name, given in _ODD.items()),
    ),
    benchmarks=tuple(Case(name, partial(_gradients, **given)) for name, given in _BENCHMARKS.items()),
    tolerance=Tolerance(forward=2e-5),
    cost=_backward_cost,
    baselines={"eager": reference.group_norm_silu_backward},
    kernels=(
        _kernel("sums_kernel", f"grad_ptr {_AFFINE} partial_ptr {_SIZES} programs", {**_TILE, "SILU": True}),
        *(
            _kernel(
                "combine_backward_kernel",
                f"partial_ptr weight_ptr rstd_ptr means_ptr sums_ptr grad_emb_ptr {_SIZES} programs samples",
                {"HAS_EMB": True, "BLOCK_P": 1024 // j, "BLOCK_J": j},
            )
            for j in _WIDTHS
        ),
        _kernel("gradient_kernel", f"grad_ptr {_AFFINE} means_ptr out_ptr {_SIZES} programs", {**_TILE, "SILU": True}),
    ),
)

group_norm_silu_backward_op = build_op(BACKWARD)
group_norm_silu_op = build_op(FORWARD)
SPECS = (FORWARD, BACKWARD)
