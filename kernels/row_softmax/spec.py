"""Operator description of the softmax over rows."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.row_softmax import reference

LONGEST = 32768  # what 16 warps hold in registers


def _inputs(device: str, dtype: torch.dtype, *, shape: tuple[int, ...], factor: float = 3.0) -> tuple:
    random = torch.Generator().manual_seed(0)
    return ((factor * torch.randn(shape, generator=random)).to(device, dtype),)


def _left_out(device: str, dtype: torch.dtype) -> tuple:
    (x,) = _inputs(device, dtype, shape=(5, 70))
    return (x.masked_fill(x > 2, float("-inf")),)


def _fake(x: Tensor) -> Tensor:
    torch._check(x.ndim >= 1 and x.shape[-1] > 0, lambda: "x must have rows with entries")
    return torch.empty_like(x)


def _supports(x: Tensor) -> str | None:
    return f"rows of more than {LONGEST}" if x.shape[-1] > LONGEST else unsupported(x)


def _cost(x: Tensor) -> Cost:
    return Cost(bytes=2 * x.numel() * x.element_size(), flops=6 * x.numel())


_SHAPES = {
    "small": (2, 3, 10),
    "vector": (7,),
    "one_entry": (5, 1),
    "odd": (3, 5, 257),
    "long": (2, 5003),
    "just_over": (3, 1030),
    "empty": (0, 8),
}
# logits of the VAE's attention: frames at once, pixels, pixels
_CLIPS = {"16x320x512": (16, 2560, 2560), "25x576x1024": (3, 9216, 9216)}

FORWARD = OpSpec(
    name="row_softmax",
    schema="(Tensor x) -> Tensor",
    reference=reference.row_softmax,
    fake=_fake,
    fast=launcher("row_softmax.triton", "row_softmax"),
    available=unavailable,
    supports=_supports,
    cases=(
        *(Case(name, partial(_inputs, shape=shape)) for name, shape in _SHAPES.items()),
        Case("large", partial(_inputs, shape=(3, 40), factor=1e4)),
        Case("left_out", _left_out),
    ),
    benchmarks=tuple(Case(name, partial(_inputs, shape=shape)) for name, shape in _CLIPS.items()),
    tolerance=Tolerance(forward=5e-6),
    cost=_cost,
    baselines={"eager": partial(torch.softmax, dim=-1)},
    kernels=tuple(
        TritonKernel(
            "row_softmax.triton", "row_softmax_kernel", {"x_ptr": k, "out_ptr": k, "length": "i32"}, {"BLOCK": b, "EXTRA": e}, w
        )
        for k, b, e, w in (("*bf16", 2048, 512, 2), ("*bf16", 8192, 1024, 8), ("*fp32", 32768, 0, 16))
    ),
)

row_softmax_op = build_op(FORWARD)
SPECS = (FORWARD,)
