"""Operator descriptions of GEGLU and its backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.geglu import reference


def _inputs(device: str, dtype: torch.dtype, *, shape: tuple[int, ...], factor: float = 1.0) -> tuple:
    random = torch.Generator().manual_seed(0)
    return ((factor * torch.randn(shape, generator=random)).to(device, dtype),)


def _gradients(device: str, dtype: torch.dtype, *, shape: tuple[int, ...], factor: float = 1.0) -> tuple:
    (x,) = _inputs(device, dtype, shape=shape, factor=factor)
    return x[..., : shape[-1] // 2].flip(-1).contiguous(), x


def _fake(x: Tensor) -> Tensor:
    torch._check(x.ndim >= 1 and x.shape[-1] % 2 == 0, lambda: "the last axis of x must hold value and gate: an even size")
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    return geglu_backward_op(grad.contiguous(), *ctx.saved_tensors)


def _cost(x: Tensor) -> Cost:
    return Cost(bytes=x.numel() * x.element_size() * 3 // 2, flops=15 * x.numel())


def _backward_cost(grad: Tensor, x: Tensor) -> Cost:
    return Cost(bytes=(grad.numel() + 2 * x.numel()) * x.element_size(), flops=25 * x.numel())


# one clip, the three widths of the network at their resolutions: [batch, tokens, 2 x 4 x width]
_CLIPS = {
    "16x320x512_width320": (16, 40 * 64, 2560),
    "16x320x512_width640": (16, 20 * 32, 5120),
    "16x320x512_width1280": (16, 10 * 16, 10240),
    "25x576x1024_width320": (25, 72 * 128, 2560),
}
_SHAPES = {
    "small": (2, 3, 10),
    "vector": (6,),
    "odd": (3, 5, 7, 2 * 33),
    "across_programs": (7, 2 * 259),
    "empty": (0, 8),
    "no_channels": (4, 0),
}
_SIZES = {"rows": "i64", "channels": "i32"}
_TILE = {"BLOCK_M": 4, "BLOCK_C": 256}
FORWARD = OpSpec(
    name="geglu",
    schema="(Tensor x) -> Tensor",
    reference=reference.geglu,
    fake=_fake,
    fast=launcher("geglu.triton", "geglu"),
    available=unavailable,
    supports=lambda x: "an odd last axis" if x.shape[-1] % 2 else unsupported(x),
    setup_context=_context,
    backward=_backward,
    grad_args=(0,),
    cases=(
        *(Case(name, partial(_inputs, shape=shape), gradcheck=name in ("small", "vector")) for name, shape in _SHAPES.items()),
        Case("tails", partial(_inputs, shape=(3, 40), factor=20.0)),
    ),
    benchmarks=tuple(Case(name, partial(_inputs, shape=shape)) for name, shape in _CLIPS.items()),
    tolerance=Tolerance(forward=1e-6, backward=1e-6),
    cost=_cost,
    baselines={"eager": reference.eager},
    kernels=tuple(
        TritonKernel(
            "geglu.triton",
            "geglu_kernel",
            {**dict.fromkeys(("x_ptr", "out_ptr"), kind), **_SIZES},
            {"EXACT": kind == "*fp32", "ALONG": True, "ONCE": False, **_TILE},
            warps=2,
        )
        for kind in ("*bf16", "*fp32")
    ),
)
BACKWARD = OpSpec(
    name="geglu_backward",
    schema="(Tensor grad, Tensor x) -> Tensor",
    reference=reference.geglu_backward,
    fake=lambda grad, x: torch.empty_like(x),
    fast=launcher("geglu.triton", "geglu_backward"),
    available=unavailable,
    supports=lambda grad, x: unsupported(grad, x) if 2 * grad.numel() == x.numel() else "shapes that do not fit together",
    cases=(
        *(Case(name, partial(_gradients, shape=shape)) for name, shape in _SHAPES.items()),
        Case("tails", partial(_gradients, shape=(3, 40), factor=20.0)),
    ),
    benchmarks=tuple(Case(name, partial(_gradients, shape=shape)) for name, shape in _CLIPS.items()),
    tolerance=Tolerance(forward=1e-6),
    cost=_backward_cost,
    baselines={"eager": reference.geglu_backward},
    kernels=(
        TritonKernel(
            "geglu.triton",
            "geglu_backward_kernel",
            {**dict.fromkeys(("grad_ptr", "x_ptr", "out_ptr"), "*bf16"), **_SIZES},
            _TILE,
        ),
    ),
)

geglu_backward_op = build_op(BACKWARD)
geglu_op = build_op(FORWARD)
SPECS = (FORWARD, BACKWARD)
