"""Operator description of the distance of point maps. It finds its gradients on the way; its backward pass only scales them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.point_map_distance import reference


def _inputs(device: str, dtype: torch.dtype, *, photos: int, maps: int, pixels: int, exact: bool = False) -> tuple:
    """Points three units away, residuals of about a tenth; ``exact`` makes every other distance zero, in any dtype."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    depths = 3 + 0.3 * normal(photos, pixels)
    rays = 0.3 * normal(2, pixels)
    if exact:
        depths, rays = (16 * depths).round() / 16, (16 * rays).round() / 16
    own = torch.cat([depths[:, None] * rays, depths[:, None]], 1)[:, None]
    near = torch.eye(3, 4, dtype=torch.float64)
    weights = normal(photos, maps, pixels).exp()
    if exact:
        cameras, motions = near.expand(photos, 3, 4).clone(), near.expand(photos, maps, 3, 4).clone()
        points = own + (torch.arange(pixels) % 2) * torch.ones(photos, maps, 3, 1)
    else:
        cameras = near + 0.02 * normal(photos, 3, 4)
        motions = near + 0.02 * normal(photos, maps, 3, 4)
        points = own + 0.1 * normal(photos, maps, 3, pixels)
        weights[:, maps // 2 + 1 :] = 0  # as for photos with fewer maps
    return tuple(x.to(device, dtype) for x in (depths, rays, cameras, motions, points, weights))


def _fake(
    depths: Tensor, rays: Tensor, cameras: Tensor, motions: Tensor, points: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch._check(weights.ndim == 3 and depths.ndim == 2, lambda: "weights must have shape [V, M, P] and depths [V, P]")
    photos, maps, pixels = weights.shape
    torch._check(depths.shape == (photos, pixels), lambda: "depths must have shape [V, P]")
    torch._check(rays.shape == (2, pixels), lambda: "rays must have shape [2, P]")
    torch._check(cameras.shape == (photos, 3, 4), lambda: "cameras must have shape [V, 3, 4]")
    torch._check(motions.shape == (photos, maps, 3, 4), lambda: "motions must have shape [V, M, 3, 4]")
    torch._check(points.shape == (photos, maps, 3, pixels), lambda: "points must have shape [V, M, 3, P]")
    return depths.new_empty(()), torch.empty_like(depths), torch.empty_like(cameras), torch.empty_like(motions)


def _context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    of_depths, of_cameras, of_motions = ctx.saved_tensors
    return grad * of_depths, None, grad * of_cameras, grad * of_motions, None, None


def _supports(*tensors: Tensor) -> str | None:
    return unsupported(*tensors, dtypes=(torch.float32,))


def _cost(depths: Tensor, rays: Tensor, cameras: Tensor, motions: Tensor, points: Tensor, weights: Tensor) -> Cost:
    numbers = points.numel() + weights.numel() + 2 * depths.numel() + rays.numel()
    return Cost(bytes=numbers * depths.element_size(), flops=60 * weights.numel())


_CASES = {
    "small": {"photos": 2, "maps": 3, "pixels": 5},
    "one_pixel": {"photos": 3, "maps": 1, "pixels": 1},
    "odd": {"photos": 3, "maps": 4, "pixels": 37 * 53},
    "across_programs": {"photos": 2, "maps": 5, "pixels": 2053},
    "zero_distance": {"photos": 2, "maps": 2, "pixels": 1031, "exact": True},
    "empty": {"photos": 2, "maps": 2, "pixels": 0},
    "no_photos": {"photos": 0, "maps": 2, "pixels": 7},
    "no_maps": {"photos": 2, "maps": 0, "pixels": 7},
}
_POINTERS = ("depths_ptr", "rays_ptr", "cameras_ptr", "motions_ptr", "points_ptr", "weights_ptr", "out_ptr", "partial_ptr")
_SUMS = ("partial_ptr", "cameras_ptr", "motions_ptr", "loss_ptr")
SPEC = OpSpec(
    name="point_map_distance",
    schema="(Tensor depths, Tensor rays, Tensor cameras, Tensor motions, Tensor points, Tensor weights)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.point_map_distance,
    fake=_fake,
    fast=launcher("point_map_distance.triton", "point_map_distance"),
    available=unavailable,
    supports=_supports,
    setup_context=_context,
    backward=_backward,
    grad_args=(0, 2, 3),
    cases=tuple(
        Case(name, partial(_inputs, **sizes), gradcheck=name in ("small", "one_pixel")) for name, sizes in _CASES.items()
    ),
    benchmarks=(
        Case("8_photos_288x512", partial(_inputs, photos=8, maps=14, pixels=288 * 512)),
        Case("3_photos_384x512", partial(_inputs, photos=3, maps=4, pixels=384 * 512)),
    ),
    tolerance=Tolerance(forward=1e-5, backward=1e-5),
    cost=_cost,
    baselines={"eager": reference.point_map_distance},
    kernels=(
        TritonKernel(
            "point_map_distance.triton",
            "point_map_distance_kernel",
            {**dict.fromkeys(_POINTERS, "*fp32"), **dict.fromkeys(("photos", "maps", "pixels"), "i32")},
            {"BLOCK": 256},
            warps=1,
        ),
        TritonKernel(
            "point_map_distance.triton",
            "point_map_sums_kernel",
            {**dict.fromkeys(_SUMS, "*fp32"), **dict.fromkeys(("photos", "maps", "blocks"), "i32")},
            {"BLOCK": 1024},
            warps=1,
        ),
    ),
)

point_map_distance_op = build_op(SPEC)
SPECS = (SPEC,)
