"""Test cases and benchmark shapes of the point rasterizer; every call of a ``make`` gives the same values."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fvgen.kernels._spec import Case
from fvgen.kernels.point_rasterizer import reference


def _random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud_ndc(views: int, points: int, height: int, width: int, seed: int) -> Tensor:
    """Random ``[V, P, 3]`` float64 points over and around an image; every seventh point is behind the camera."""
    s = min(height, width)
    xyz = torch.rand(views, points, 3, generator=_random(seed), dtype=torch.float64)
    out = torch.empty_like(xyz)
    out[..., 0] = (2 * xyz[..., 0] - 1) * 1.1 * width / s
    out[..., 1] = (2 * xyz[..., 1] - 1) * 1.1 * height / s
    out[..., 2] = 1 + xyz[..., 2]
    out[:, ::7, 2] *= -1
    return out


def cameras(views: int, height: int, width: int) -> Tensor:
    """Packed ``[V, 16]`` float64 cameras two units in front of the origin on a small arc."""
    rows = []
    s = min(height, width) / 2
    for v in range(views):
        a = 0.2 * (v - (views - 1) / 2)
        rot = [math.cos(a), 0.0, math.sin(a), 0.0, 1.0, 0.0, -math.sin(a), 0.0, math.cos(a)]
        rows.append([*rot, 0.02 * v, 0.0, 2.0, -0.8 * width / s, 0.03, -0.8 * width / s, -0.02])
    return torch.tensor(rows, dtype=torch.float64)


def _to(args: tuple, device: Any, dtype: torch.dtype) -> tuple:
    return tuple(
        a.to(device, dtype if a.is_floating_point() else a.dtype) if isinstance(a, Tensor) else a  # keeps ints and strings
        for a in args
    )


def _fragments(
    device: Any, dtype: torch.dtype, v: int, p: int, h: int, w: int, r: float, k: int, strided: bool = False, ties: bool = False
) -> tuple:
    points = cloud_ndc(v, p, h, w, seed=p + h)
    if ties:
        points[..., 2] = (points[..., 2] * 2).round() / 2
    if strided:
        points = torch.cat([points, points], dim=-1)
        return (*_to((points,), device, dtype)[0][None, ..., :3], h, w, r, k)
    return _to((points, h, w, r, k), device, dtype)


def _fragments_backward(device: Any, dtype: torch.dtype, **kw: Any) -> tuple:
    points, h, w, r, k = _fragments("cpu", dtype, **kw)
    _, _, idx = reference.rasterize_fragments(points, h, w, r, k)
    g = _random(5)
    grads = (torch.randn(idx.shape, generator=g, dtype=torch.float64) for _ in range(2))
    return _to((points, idx, *grads), device, dtype)


def _composite(
    device: Any, dtype: torch.dtype, c: int, mode: str, background: bool, v: int, p: int, h: int, w: int, r: float, k: int
) -> tuple:
    points = cloud_ndc(v, p, h, w, seed=p + h)
    _, dists2, idx = reference.rasterize_fragments(points, h, w, r, k)
    features = torch.rand(p, c, generator=_random(1), dtype=torch.float64)
    colour = torch.linspace(0.2, 0.8, c, dtype=torch.float64) if background else None
    return _to((idx, dists2, features, r, mode, colour), device, dtype)


def _composite_backward(device: Any, dtype: torch.dtype, **kw: Any) -> tuple:
    idx, dists2, features, r, mode, _ = _composite("cpu", dtype, **kw)
    grad = torch.randn((*idx.shape[:3], features.shape[1]), generator=_random(2), dtype=torch.float64)
    return _to((grad, idx, dists2, features, r, mode), device, dtype)


def _render(
    device: Any,
    dtype: torch.dtype,
    c: int,
    mode: str,
    background: bool,
    v: int,
    p: int,
    h: int,
    w: int,
    r: float,
    k: int,
    keep: bool = True,
) -> tuple:
    g = _random(3 + p)
    points = torch.randn(p, 3, generator=g, dtype=torch.float64) * torch.tensor([0.8, 0.8, 0.5], dtype=torch.float64)
    features = torch.rand(p, c, generator=g, dtype=torch.float64)
    colour = torch.linspace(0.2, 0.8, c, dtype=torch.float64) if background else None
    return _to((points, features, cameras(v, h, w), h, w, r, k, mode, colour, keep), device, dtype)


def _render_backward(device: Any, dtype: torch.dtype, **kw: Any) -> tuple:
    args = _render("cpu", dtype, **kw)
    points, features, cams, _, _, r, _, mode, _, _ = args
    image, depth, idx = reference.render_points(*args)
    g = _random(4)
    grad_image = torch.randn(image.shape, generator=g, dtype=torch.float64)
    grad_depth = torch.randn(depth.shape, generator=g, dtype=torch.float64)
    return _to((grad_image, grad_depth, points, features, cams, idx, r, mode), device, dtype)


def _cases(make: Any, **named: tuple[dict, bool]) -> tuple[Case, ...]:
    return tuple(Case(name, partial(make, **kw), grad) for name, (kw, grad) in named.items())


_SIZES: dict[str, tuple[dict, bool]] = {
    "small": ({"v": 2, "p": 25, "h": 5, "w": 7, "r": 0.35, "k": 3}, True),
    "tall_one_slot": ({"v": 1, "p": 12, "h": 9, "w": 4, "r": 0.5, "k": 1}, True),
    "odd": ({"v": 3, "p": 301, "h": 33, "w": 17, "r": 0.21, "k": 11}, False),
    "many_slots": ({"v": 1, "p": 400, "h": 13, "w": 12, "r": 0.6, "k": 64}, False),
    "empty": ({"v": 2, "p": 0, "h": 6, "w": 5, "r": 0.1, "k": 4}, False),
    "one_pixel": ({"v": 1, "p": 30, "h": 1, "w": 1, "r": 0.7, "k": 5}, False),
    "radius_over_image": ({"v": 1, "p": 60, "h": 7, "w": 19, "r": 5.0, "k": 8}, False),
}


def _with(sizes: dict[str, tuple[dict, bool]], **extra: Any) -> dict[str, tuple[dict, bool]]:
    return {name: ({**kw, **extra}, grad) for name, (kw, grad) in sizes.items()}


def _blends() -> dict[str, tuple[dict, bool]]:
    out = _with(_SIZES, c=3, mode="alpha", background=False)
    small = _SIZES["small"][0]
    out["norm"] = ({**small, "c": 3, "mode": "norm", "background": False}, True)
    out["seven_channels"] = ({**_SIZES["odd"][0], "c": 7, "mode": "norm", "background": True}, False)
    out["one_channel_background"] = ({**small, "c": 1, "mode": "alpha", "background": True}, True)
    return out


FRAGMENTS = _cases(
    _fragments,
    **_SIZES,
    ties=({**_SIZES["odd"][0], "ties": True}, False),
    strided=({**_SIZES["odd"][0], "v": 1, "strided": True}, False),
)
FRAGMENTS_BACKWARD = _cases(_fragments_backward, **_SIZES)
COMPOSITE = _cases(_composite, **_blends())
COMPOSITE_BACKWARD = _cases(_composite_backward, **_blends())
_IMAGE_ONLY = {**_SIZES["odd"][0], "c": 3, "mode": "alpha", "background": False, "keep": False}
RENDER = (*_cases(_render, **_blends()), Case("image_only", partial(_render, **_IMAGE_ONLY), differentiable=False))
RENDER_BACKWARD = _cases(_render_backward, **_blends())


def point_map_scene(
    device: Any, dtype: torch.dtype, views: int, height: int, width: int, sources: int, rows: int, cols: int, keep: bool = False
) -> tuple:
    """Arguments of ``render_points``: point maps of ``sources`` photos (rolling depth, noise), seen from views between them."""
    s = min(height, width) / 2
    focal = 0.9 * width
    g = _random(0)
    points, colours, poses = [], [], []
    for n in range(sources):
        a = 0.25 * (n / max(sources - 1, 1) - 0.5)
        v, u = torch.meshgrid((torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols, indexing="ij")
        depth = 2.5 + 0.5 * torch.sin(5 * u + n) * torch.cos(4 * v) + 0.01 * torch.randn(rows, cols, generator=g)
        local = torch.stack([(u - 0.5) * width / focal * depth, (v - 0.5) * height / focal * depth, depth], dim=-1).reshape(-1, 3)
        rot, centre = _orbit(a)
        points.append(local.double() @ rot.T + centre)
        colours.append(torch.rand(rows * cols, 3, generator=g))
    for n in range(views):
        rot, centre = _orbit(0.25 * (n / max(views - 1, 1) - 0.5))
        lens = torch.tensor([-focal / s, 0.0, -focal / s, 0.0], dtype=torch.float64)
        poses.append(torch.cat([rot.T.reshape(9), -(rot.T @ centre), lens]))
    args = (torch.cat(points), torch.cat(colours), torch.stack(poses), height, width, 0.01, 10, "alpha", None, keep)
    return _to(args, device, dtype)


def _orbit(angle: float) -> tuple[Tensor, Tensor]:
    """Rotation world_from_cam and centre of a camera that looks at (0, 0, 2.5) from distance 2.5."""
    c, s = math.cos(angle), math.sin(angle)
    rot = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64)
    pivot = torch.tensor([0.0, 0.0, 2.5], dtype=torch.float64)
    return rot, pivot - rot @ pivot


RENDER_BENCHMARKS = (
    Case("16x327680_320x512", partial(point_map_scene, views=16, height=320, width=512, sources=2, rows=320, cols=512)),
    Case("25x294912_288x512", partial(point_map_scene, views=25, height=288, width=512, sources=2, rows=288, cols=512)),
    Case("16x4M_576x1024", partial(point_map_scene, views=16, height=576, width=1024, sources=7, rows=576, cols=1024)),
)
