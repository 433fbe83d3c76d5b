"""Plain PyTorch point rasterizer: projection, K nearest points per pixel, compositing, and their backward passes.

Runs on CPU and CUDA tensors in float32 and float64. Every float32 rounding that decides about a hit happens in a stated order
without fused multiply-add, so the CUDA version reproduces it bit for bit. Derivation and rules: README.md beside this file.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 6_000_000  # candidate (point, pixel) pairs held at once
_SLACK = 0.01  # pixels; covers the rounding of a point's pixel coordinate, the exact test comes afterwards


def pixel_centers(n: int, other: int, like: Tensor) -> Tensor:
    """NDC coordinate of the pixel centres of a side with ``n`` pixels (the other side has ``other``), first pixel first."""
    i = torch.arange(n - 1, -1, -1, dtype=like.dtype)  # on the CPU: CUDA divides by a scalar through its reciprocal
    extent = torch.tensor(2.0, dtype=like.dtype)
    if n > other:
        extent = (n * extent) / other
    offset = extent / 2
    return (-offset + (extent * i + offset) / n).to(like.device)


def project(points: Tensor, cameras: Tensor) -> Tensor:
    """World points ``[P, 3]`` through packed cameras ``[V, 16]`` to ``[V, P, 3]``: NDC x, NDC y, view depth."""
    x, y, z = points.unbind(-1)
    c = cameras[:, :, None].unbind(1)  # 16 x [V, 1]
    xc = ((c[0] * x + c[1] * y) + c[2] * z) + c[9]
    yc = ((c[3] * x + c[4] * y) + c[5] * z) + c[10]
    zc = ((c[6] * x + c[7] * y) + c[8] * z) + c[11]
    return torch.stack([c[13] + c[12] * (xc / zc), c[15] + c[14] * (yc / zc), zc], dim=-1)


def project_backward(grad_ndc: Tensor, points: Tensor, cameras: Tensor) -> Tensor:
    """Gradient ``[P, 3]`` of :func:`project` with respect to the points; 0 where 1/depth is not finite."""
    total = torch.zeros_like(points)
    for g, cam in zip(grad_ndc, cameras, strict=True):
        rot, t = cam[:9].view(3, 3), cam[9:12]
        xc, yc, zc = (((rot[i, 0] * points[:, 0] + rot[i, 1] * points[:, 1]) + rot[i, 2] * points[:, 2]) + t[i] for i in range(3))
        inv = zc.reciprocal()
        gx, gy = g[:, 0] * cam[12] * inv, g[:, 1] * cam[14] * inv
        g_cam = torch.stack([gx, gy, g[:, 2] - (gx * (xc / zc) + gy * (yc / zc))], dim=-1)
        used = (inv.isfinite() & (g != 0).any(-1))[:, None]
        # 0 * inf of a point that was never hit must not become NaN
        total += torch.where(used, torch.where(used, g_cam, 0.0) @ rot, 0.0)
    return total


def rasterize_fragments(points_ndc: Tensor, height: int, width: int, radius: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    views, count, _ = points_ndc.shape
    idx = torch.full((views, height, width, k), -1, dtype=torch.int32, device=points_ndc.device)
    zbuf = points_ndc.new_full((views, height, width, k), -1.0)
    dists2 = zbuf.clone()
    xf, yf = pixel_centers(width, height, points_ndc), pixel_centers(height, width, points_ndc)
    for v in range(views):
        _rasterize_view(points_ndc[v], xf, yf, radius, k, v * count, idx[v], zbuf[v], dists2[v])
    return zbuf, dists2, idx


def _rasterize_view(
    xyz: Tensor, xf: Tensor, yf: Tensor, radius: float, k: int, offset: int, idx: Tensor, zbuf: Tensor, dists2: Tensor
) -> None:
    """Fills ``idx, zbuf, dists2 [H, W, K]`` of one view; ``offset`` is added to the point index."""
    height, width = len(yf), len(xf)
    r2 = torch.tensor(radius, dtype=xyz.dtype).square().to(xyz.device)
    scale = min(height, width) / 2
    reach = radius * scale + _SLACK
    x, y, z = xyz.detach().unbind(-1)
    u, v = width / 2 - 0.5 - x * scale, height / 2 - 0.5 - y * scale  # in pixel indices
    seen = (z >= 0) & (z < math.inf) & (u > -reach - 1) & (u < width + reach) & (v > -reach - 1) & (v < height + reach)
    ids = seen.nonzero().squeeze(-1)
    x, y, z, u, v = x[ids], y[ids], z[ids], u[ids], v[ids]

    # Each point can only hit a window of nx * ny pixels; a window shifted back into the image still holds every pixel it can hit.
    nx, ny = min(width, math.floor(2 * reach) + 1), min(height, math.floor(2 * reach) + 1)
    c0 = (u - reach).ceil().clamp(0, width - nx).long()
    r0 = (v - reach).ceil().clamp(0, height - ny).long()
    cols, rows = torch.arange(nx, device=xyz.device), torch.arange(ny, device=xyz.device)
    in_window = (rows[:, None] * width + cols).flatten()

    best: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None  # pixel, rank, id, depth, distance
    step = max(1, _CHUNK // (nx * ny))
    for a in range(0, len(ids), step):
        part = slice(a, a + step)
        dx = xf[c0[part, None] + cols] - x[part, None]
        dy = yf[r0[part, None] + rows] - y[part, None]
        d2 = ((dx * dx)[:, None, :] + (dy * dy)[:, :, None]).flatten()
        hit = (d2 < r2).nonzero().squeeze(-1)  # ascending point index
        point = hit // (nx * ny)
        pixel = (r0[part] * width + c0[part])[point] + in_window[hit - point * (nx * ny)]
        found = (pixel, ids[part][point], z[part][point], d2[hit])
        if best is not None:
            found = tuple(torch.cat(pair) for pair in zip((best[0], *best[2:]), found, strict=True))
        best = _nearest(*found, pixels=height * width, k=k)
    if best is None:
        return
    pixel, rank, point, depth, dist = best
    slot = pixel * k + rank
    idx.view(-1)[slot] = (point + offset).int()
    zbuf.view(-1)[slot] = depth
    dists2.view(-1)[slot] = dist


def _nearest(pixel: Tensor, point: Tensor, z: Tensor, d2: Tensor, *, pixels: int, k: int) -> tuple[Tensor, ...]:
    """The ``k`` nearest hits of every pixel by (depth, position in the list); needs ascending indices within equal depths."""
    if z.dtype == torch.float32:
        # depths are >= 0, so their bit patterns order like the numbers; + 0.0 turns -0.0 into 0.0
        key = (pixel << 32) | (z + 0.0).view(torch.int32).long()
        order = key.sort(stable=True).indices
    else:
        order = z.sort(stable=True).indices
        order = order[pixel[order].sort(stable=True).indices]
    pixel = pixel[order]
    hits = torch.bincount(pixel, minlength=pixels)
    rank = torch.arange(len(pixel), device=pixel.device) - (hits.cumsum(0) - hits)[pixel]
    keep = rank < k
    order = order[keep]
    return pixel[keep], rank[keep], point[order], z[order], d2[order]


def rasterize_fragments_backward(points_ndc: Tensor, idx: Tensor, grad_zbuf: Tensor, grad_dists2: Tensor) -> Tensor:
    _, height, width, k = idx.shape
    xf, yf = pixel_centers(width, height, points_ndc), pixel_centers(height, width, points_ndc)
    flat = points_ndc.reshape(-1, 3)
    slots = (idx.reshape(-1) >= 0).nonzero().squeeze(-1)
    point = idx.reshape(-1)[slots].long()
    row, col = slots // (k * width) % height, slots // k % width
    g = 2 * grad_dists2.reshape(-1)[slots]
    grad = torch.stack([g * (flat[point, 0] - xf[col]), g * (flat[point, 1] - yf[row]), grad_zbuf.reshape(-1)[slots]], dim=-1)
    return torch.zeros_like(flat).index_add_(0, point, grad).view(points_ndc.shape)


def _weights(idx: Tensor, dists2: Tensor, radius: float) -> Tensor:
    return torch.where(idx >= 0, 1 - dists2 / (radius * radius), 0.0)


def _behind(w: Tensor) -> Tensor:
    """Transmittance in front of each slot: the product of 1 - w over the nearer slots."""
    t = (1 - w).cumprod(-1)
    return torch.cat([torch.ones_like(t[..., :1]), t[..., :-1]], dim=-1)


def _gather(features: Tensor, idx: Tensor) -> Tensor:
    """``features`` rows of every slot, ``[..., K, C]``; a packed index refers to row ``index mod rows``."""
    if len(features) == 0:
        return features.new_zeros((*idx.shape, features.shape[1]))
    return features[idx.long().clamp(min=0) % len(features)]


def composite(idx: Tensor, dists2: Tensor, features: Tensor, radius: float, mode: str, background: Tensor | None) -> Tensor:
    image = features.new_empty((*idx.shape[:3], features.shape[1]))
    for v in range(len(idx)):
        w = _weights(idx[v], dists2[v], radius)
        w = w * _behind(w) if mode == "alpha" else w / w.sum(-1, keepdim=True).clamp(min=1e-4)
        image[v] = (w[..., None, :] @ _gather(features, idx[v])).squeeze(-2)
    if background is not None:
        image = torch.where(idx[..., :1] < 0, background, image)
    return image


def composite_backward(
    grad_image: Tensor, idx: Tensor, dists2: Tensor, features: Tensor, radius: float, mode: str
) -> tuple[Tensor, Tensor]:
    grad_dists2 = torch.zeros_like(dists2)
    grad_features = torch.zeros_like(features)
    for v in range(len(idx)):
        hit = idx[v] >= 0
        w = _weights(idx[v], dists2[v], radius)
        dot = (_gather(features, idx[v]) @ grad_image[v][..., None]).squeeze(-1)  # <g, f_k>
        if mode == "alpha":
            t = _behind(w)
            share = w * t
            term = share * dot
            behind = term.flip(-1).cumsum(-1).flip(-1)
            behind = torch.cat([behind[..., 1:], torch.zeros_like(behind[..., :1])], dim=-1)
            grad_w = t * dot - behind / (1 - w + 1e-9)
        else:
            total = w.sum(-1, keepdim=True).clamp(min=1e-4)
            share = w / total
            grad_w = (dot * total - (w * dot).sum(-1, keepdim=True)) / (total * total)
        grad_dists2[v] = torch.where(hit, -grad_w / (radius * radius), 0.0)
        if len(features):
            rows = idx[v][hit].long() % len(features)
            pixel = hit.flatten(0, 1).nonzero()[:, 0]
            grad = share[hit][:, None] * grad_image[v].flatten(0, 1)[pixel]
            grad_features.index_add_(0, rows, grad)
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
    images, depths, fragments = [], [], []
    for cam in cameras:
        zbuf, dists2, idx = rasterize_fragments(project(points, cam[None]), height, width, radius, k)
        images.append(composite(idx, dists2, features, radius, mode, background))
        depths.append(zbuf[..., 0].clamp(min=0))
        offset = len(fragments) * len(points)
        fragments.append(torch.where(idx >= 0, idx + offset, idx) if keep_fragments else idx[..., :0])
    return torch.cat(images), torch.cat(depths), torch.cat(fragments)


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
    _, height, width, _ = idx.shape
    grad_points, grad_features = torch.zeros_like(points), torch.zeros_like(features)
    xf, yf = pixel_centers(width, height, points), pixel_centers(height, width, points)
    for v in range(len(cameras)):
        hit = idx[v : v + 1] >= 0
        local = torch.where(hit, idx[v : v + 1] - v * len(points), -1)
        ndc = project(points, cameras[v : v + 1])
        if len(points):
            at = ndc[0][local.long().clamp(min=0)]
            dx, dy = xf[:, None] - at[..., 0], yf[:, None, None] - at[..., 1]
            dists2 = torch.where(hit, dx * dx + dy * dy, -1.0)
        else:
            dists2 = torch.full(local.shape, -1.0, dtype=points.dtype, device=points.device)
        grad_dists2, grad_f = composite_backward(grad_image[v : v + 1], local, dists2, features, radius, mode)
        grad_zbuf = torch.zeros_like(grad_dists2)
        grad_zbuf[..., 0] = grad_depth[v]
        grad_ndc = rasterize_fragments_backward(ndc, local, grad_zbuf, grad_dists2)
        grad_points += project_backward(grad_ndc, points, cameras[v : v + 1])
        grad_features += grad_f
    return grad_points, grad_features
