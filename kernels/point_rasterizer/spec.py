"""Operator descriptions of the point rasterizer: three forward operators and their backward operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Cost, OpSpec, Tolerance
from fvgen.kernels.point_rasterizer import cases, cuda, reference

# ---- rasterize_fragments ----------------------------------------------------------------------------------------------------


def _fragments_fake(points_ndc: Tensor, height: int, width: int, radius: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(points_ndc.ndim == 3 and points_ndc.shape[2] == 3, lambda: "points_ndc must have shape [V, P, 3]")
    shape = (points_ndc.shape[0], height, width, k)
    return points_ndc.new_empty(shape), points_ndc.new_empty(shape), points_ndc.new_empty(shape, dtype=torch.int32)


def _fragments_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0], output[2])
    ctx.mark_non_differentiable(output[2])


def _fragments_backward(ctx: Any, grad_zbuf: Tensor, grad_dists2: Tensor, _: Any) -> tuple:
    points_ndc, idx = ctx.saved_tensors
    grad = rasterize_fragments_backward_op(points_ndc, idx, grad_zbuf.contiguous(), grad_dists2.contiguous())
    return grad, None, None, None, None


FRAGMENTS = OpSpec(
    name="rasterize_fragments",
    schema="(Tensor points_ndc, int height, int width, float radius, int k) -> (Tensor, Tensor, Tensor)",
    reference=reference.rasterize_fragments,
    fake=_fragments_fake,
    fast=cuda.rasterize_fragments,
    available=cuda.unavailable,
    supports=lambda p, h, w, r, k: cuda.unsupported(p, k=k),
    setup_context=_fragments_context,
    backward=_fragments_backward,
    grad_args=(0,),
    cases=cases.FRAGMENTS,
    tolerance=Tolerance(forward=0.0, backward=1e-5),
)
FRAGMENTS_BACKWARD = OpSpec(
    name="rasterize_fragments_backward",
    schema="(Tensor points_ndc, Tensor idx, Tensor grad_zbuf, Tensor grad_dists2) -> Tensor",
    reference=reference.rasterize_fragments_backward,
    fake=lambda p, idx, gz, gd: torch.empty_like(p),
    fast=cuda.rasterize_fragments_backward,
    available=cuda.unavailable,
    supports=lambda p, idx, gz, gd: cuda.unsupported(p),
    cases=cases.FRAGMENTS_BACKWARD,
    tolerance=Tolerance(forward=1e-5),
)

# ---- composite --------------------------------------------------------------------------------------------------------------


def _composite_fake(idx: Tensor, dists2: Tensor, features: Tensor, radius: float, mode: str, background: Tensor | None) -> Tensor:
    torch._check(idx.shape == dists2.shape, lambda: "dists2 must have the shape of idx [V, H, W, K]")
    return features.new_empty((*idx.shape[:3], features.shape[1]))


def _composite_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    idx, dists2, features, ctx.radius, ctx.mode, _ = inputs
    ctx.save_for_backward(idx, dists2, features)


def _composite_backward(ctx: Any, grad: Tensor) -> tuple:
    grads = composite_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.radius, ctx.mode)
    return None, *grads, None, None, None


COMPOSITE = OpSpec(
    name="composite_points",
    schema="(Tensor idx, Tensor dists2, Tensor features, float radius, str mode, Tensor? background) -> Tensor",
    reference=reference.composite,
    fake=_composite_fake,
    fast=cuda.composite,
    available=cuda.unavailable,
    supports=lambda idx, d, f, r, m, b: cuda.unsupported(f, k=idx.shape[3]),
    setup_context=_composite_context,
    backward=_composite_backward,
    grad_args=(1, 2),
    cases=cases.COMPOSITE,
    tolerance=Tolerance(forward=1e-5, backward=1e-5),
)
COMPOSITE_BACKWARD = OpSpec(
    name="composite_points_backward",
    schema="(Tensor grad, Tensor idx, Tensor dists2, Tensor features, float radius, str mode) -> (Tensor, Tensor)",
    reference=reference.composite_backward,
    fake=lambda g, idx, d, f, r, m: (torch.empty_like(d), torch.empty_like(f)),
    fast=cuda.composite_backward,
    available=cuda.unavailable,
    supports=lambda g, idx, d, f, r, m: cuda.unsupported(f, k=idx.shape[3]),
    cases=cases.COMPOSITE_BACKWARD,
    tolerance=Tolerance(forward=1e-5),
)

# ---- render_points ----------------------------------------------------------------------------------------------------------


def _render_fake(
    points: Tensor,
    features: Tensor,
    cameras: Tensor,
    height: int,
    width: int,
    radius: float,
    k: int,
    mode: str,
    background: Tensor | None,
    keep_fragments: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(cameras.ndim == 2 and cameras.shape[1] == 16, lambda: "cameras must have shape [V, 16]")
    shape = (cameras.shape[0], height, width)
    idx = points.new_empty((*shape, k if keep_fragments else 0), dtype=torch.int32)
    return points.new_empty((*shape, features.shape[1])), points.new_empty(shape), idx


def _render_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    points, features, cameras, _, _, ctx.radius, _, ctx.mode, _, ctx.kept = inputs
    ctx.save_for_backward(points, features, cameras, output[2])
    ctx.mark_non_differentiable(output[2])


def _render_backward(ctx: Any, grad_image: Tensor, grad_depth: Tensor, _: Any) -> tuple:
    if not ctx.kept:
        raise RuntimeError("render_points was called with keep_fragments=False, which has no gradient; pass True")
    grads = render_points_backward_op(grad_image.contiguous(), grad_depth.contiguous(), *ctx.saved_tensors, ctx.radius, ctx.mode)
    return *grads, None, None, None, None, None, None, None, None


def _render_cost(
    points: Tensor,
    features: Tensor,
    cameras: Tensor,
    height: int,
    width: int,
    radius: float,
    k: int,
    mode: str,
    background: Tensor | None,
    keep: bool,
) -> Cost:
    views, count, channels = len(cameras), len(points), features.shape[1]
    pixels = views * height * width
    reads = 4 * count * (3 + channels)
    # each projected point is written once and read once as a 16-byte record; each pixel writes its colour and depth
    moved = 2 * 16 * views * count + 4 * pixels * (channels + 1 + (k if keep else 0))
    disc = 3.1416 * (radius * min(height, width) / 2) ** 2
    return Cost(bytes=reads + moved, flops=int(views * count * (30 + 5 * disc)))


RENDER = OpSpec(
    name="render_points",
    schema=(
        "(Tensor points, Tensor features, Tensor cameras, int height, int width, float radius, int k, str mode, "
        "Tensor? background, bool keep_fragments) -> (Tensor, Tensor, Tensor)"
    ),
    reference=reference.render_points,
    fake=_render_fake,
    fast=cuda.render_points,
    available=cuda.unavailable,
    supports=lambda p, f, c, h, w, r, k, m, b, keep: cuda.unsupported(p, k=k),
    setup_context=_render_context,
    backward=_render_backward,
    grad_args=(0, 1),
    cases=cases.RENDER,
    benchmarks=cases.RENDER_BENCHMARKS,
    tolerance=Tolerance(forward=1e-5, backward=1e-5),
    cost=_render_cost,
    baselines={"pytorch": reference.render_points},
)
RENDER_BACKWARD = OpSpec(
    name="render_points_backward",
    schema=(
        "(Tensor grad_image, Tensor grad_depth, Tensor points, Tensor features, Tensor cameras, Tensor idx, float radius, "
        "str mode) -> (Tensor, Tensor)"
    ),
    reference=reference.render_points_backward,
    fake=lambda gi, gd, p, f, c, idx, r, m: (torch.empty_like(p), torch.empty_like(f)),
    fast=cuda.render_points_backward,
    available=cuda.unavailable,
    supports=lambda gi, gd, p, f, c, idx, r, m: cuda.unsupported(p, k=idx.shape[3]),
    cases=cases.RENDER_BACKWARD,
    tolerance=Tolerance(forward=1e-5),
)

SPECS = (FRAGMENTS, FRAGMENTS_BACKWARD, COMPOSITE, COMPOSITE_BACKWARD, RENDER, RENDER_BACKWARD)

rasterize_fragments_op = build_op(FRAGMENTS)
rasterize_fragments_backward_op = build_op(FRAGMENTS_BACKWARD)
composite_op = build_op(COMPOSITE)
composite_backward_op = build_op(COMPOSITE_BACKWARD)
render_points_op = build_op(RENDER)
render_points_backward_op = build_op(RENDER_BACKWARD)
