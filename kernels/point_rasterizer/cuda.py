"""Launches the CUDA version: allocates outputs and workspace, then calls the operators of the compiled binding."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.kernels import _extension

MAX_SLOTS = 64


def unavailable() -> str | None:
    """Reason why the compiled binding cannot be used, None if it can."""
    return _extension.load()


def unsupported(values: Tensor, k: int = 1) -> str | None:
    if values.dtype != torch.float32:
        return f"only float32 is compiled, got {values.dtype}"
    if not 1 <= k <= MAX_SLOTS:
        return f"only 1 to {MAX_SLOTS} points per pixel are compiled, got {k}"
    return None


def _workspace(points: Tensor, views: int, height: int, width: int) -> Tensor:
    size = torch.ops.fvgen_cuda.raster_workspace_bytes(points, views, height, width)
    return torch.empty(size, dtype=torch.uint8, device=points.device)


def rasterize_fragments(points_ndc: Tensor, height: int, width: int, radius: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    points_ndc = points_ndc.contiguous()
    views = points_ndc.shape[0]
    shape = (views, height, width, k)
    idx = points_ndc.new_empty(shape, dtype=torch.int32)
    zbuf, dists2 = points_ndc.new_empty(shape), points_ndc.new_empty(shape)
    with torch.cuda.device(points_ndc.device):
        work = _workspace(points_ndc, views, height, width)
        torch.ops.fvgen_cuda.raster_fragments(points_ndc, radius, work, idx, zbuf, dists2)
    return zbuf, dists2, idx


def rasterize_fragments_backward(points_ndc: Tensor, idx: Tensor, grad_zbuf: Tensor, grad_dists2: Tensor) -> Tensor:
    points_ndc = points_ndc.contiguous()
    grad = torch.zeros_like(points_ndc)
    with torch.cuda.device(points_ndc.device):
        torch.ops.fvgen_cuda.raster_fragments_backward(
            points_ndc, idx.contiguous(), grad_zbuf.contiguous(), grad_dists2.contiguous(), grad
        )
    return grad


def composite(idx: Tensor, dists2: Tensor, features: Tensor, radius: float, mode: str, background: Tensor | None) -> Tensor:
    image = features.new_empty((*idx.shape[:3], features.shape[1]))
    with torch.cuda.device(features.device):
        torch.ops.fvgen_cuda.raster_composite(
            idx.contiguous(), dists2.contiguous(), features.contiguous(), background, radius, mode == "norm", image
        )
    return image


def composite_backward(
    grad: Tensor, idx: Tensor, dists2: Tensor, features: Tensor, radius: float, mode: str
) -> tuple[Tensor, Tensor]:
    grad_dists2, grad_features = dists2.new_empty(dists2.shape), torch.zeros_like(features, memory_format=torch.contiguous_format)
    with torch.cuda.device(features.device):
        torch.ops.fvgen_cuda.raster_composite_backward(
            grad.contiguous(),
            idx.contiguous(),
            dists2.contiguous(),
            features.contiguous(),
            radius,
            mode == "norm",
            grad_dists2,
            grad_features,
        )
    return grad_dists2, grad_features


def render_points(
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
    views = cameras.shape[0]
    image = points.new_empty((views, height, width, features.shape[1]))
    depth = points.new_empty((views, height, width))
    idx = points.new_empty((views, height, width, k if keep_fragments else 0), dtype=torch.int32)
    with torch.cuda.device(points.device):
        work = _workspace(points, views, height, width)
        torch.ops.fvgen_cuda.raster_render(
            points.contiguous(),
            features.contiguous(),
            cameras.contiguous(),
            background,
            radius,
            k,
            mode == "norm",
            work,
            image,
            depth,
            idx,
        )
    return image, depth, idx


def render_points_backward(
    grad_image: Tensor,
    grad_depth: Tensor,
    points: Tensor,
    features: Tensor,
    cameras: Tensor,
    idx: Tensor,
    radius: float,
    mode: str,
) -> tuple[Tensor, Tensor]:
    grad_points = torch.zeros_like(points, memory_format=torch.contiguous_format)
    grad_features = torch.zeros_like(features, memory_format=torch.contiguous_format)
    with torch.cuda.device(points.device):
        torch.ops.fvgen_cuda.raster_render_backward(
            grad_image.contiguous(),
            grad_depth.contiguous(),
            points.contiguous(),
            features.contiguous(),
            cameras.contiguous(),
            idx.contiguous(),
            radius,
            mode == "norm",
            grad_points,
            grad_features,
        )
    return grad_points, grad_features
