"""Ray casting of synthetic worlds: exact depth, shaded and textured colour, shadows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fvgen.data.synthetic.textures import sample_textures
from fvgen.data.synthetic.world import BOXES, ELLIPSOIDS, OBJECTS, Worlds

_FAR = 1e9
Shade = Callable[[Worlds, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _nearest_object(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """First hit in object space, where every object is a unit box, ball or cylinder.

    Args:
        origin: ``[B, 1, N, 3]`` ray origins in object space, divided by the extents.
        direction: ``[B, R, N, 3]`` likewise; ray parameters are those of world space.

    Returns:
        distance ``[B, R]`` (``1e9`` = none) and object number ``[B, R]``.
    """
    direction = torch.where(direction.abs() < 1e-9, torch.full_like(direction, 1e-9), direction)
    first_tube = BOXES + ELLIPSOIDS

    box_o, box_d = origin[..., :BOXES, :], direction[..., :BOXES, :]
    side, mid = 1 / box_d.abs(), -box_o / box_d
    enter, leave = (mid - side).amax(-1), (mid + side).amin(-1)
    box = torch.where((enter < leave) & (enter > 1e-4), enter, _FAR)

    ball_o, ball_d = origin[..., BOXES:first_tube, :], direction[..., BOXES:first_tube, :]
    a, half_b = (ball_d * ball_d).sum(-1), (ball_o * ball_d).sum(-1)
    root = half_b * half_b - a * ((ball_o * ball_o).sum(-1) - 1)
    enter = (-half_b - root.clamp_min(0).sqrt()) / a
    ball = torch.where((root > 0) & (enter > 1e-4), enter, _FAR)

    ox, oy, oz = origin[..., first_tube:, :].unbind(-1)
    dx, dy, dz = direction[..., first_tube:, :].unbind(-1)
    a, half_b = dx * dx + dz * dz, ox * dx + oz * dz
    root = half_b * half_b - a * (ox * ox + oz * oz - 1)
    width = root.clamp_min(0).sqrt() / a
    enter = torch.maximum(-half_b / a - width, -oy / dy - 1 / dy.abs())
    leave = torch.minimum(-half_b / a + width, -oy / dy + 1 / dy.abs())
    tube = torch.where((root > 0) & (enter < leave) & (enter > 1e-4), enter, _FAR)

    distance, number = torch.cat([box, ball, tube], -1).min(-1)
    return distance, number


def _turned(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix [..., 3, 3]`` times ``vector [..., 3]``, spelled out: a million products of 3 x 3 suit no matrix library."""
    x, y, z = vector[..., None].unbind(-2)
    return matrix[..., 0] * x + matrix[..., 1] * y + matrix[..., 2] * z


def _cast(w: Worlds, origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Rays ``origin [B, 3]``, ``direction [B, R, 3]`` in the world against the objects."""
    inverse = w.rotation.transpose(-1, -2) / w.extent[..., None]  # object from world, [B, N, 3, 3]
    local_origin = _turned(inverse, origin[:, None] - w.centre)[:, None]
    local_direction = _turned(inverse[:, None], direction[:, :, None])
    return _nearest_object(local_origin, local_direction)


def view_rays(world_from_cam: Tensor, K: Tensor, size: tuple[int, int]) -> Tensor:
    """World directions ``[B, H * W, 3]`` through the pixel centres, scaled so that the ray parameter is the depth z."""
    height, width = size
    rows = torch.arange(height, device=K.device) + 0.5
    cols = torch.arange(width, device=K.device) + 0.5
    v, u = torch.meshgrid(rows, cols, indexing="ij")
    x = (u - K[:, 0, 2, None, None]) / K[:, 0, 0, None, None]
    y = (v - K[:, 1, 2, None, None]) / K[:, 1, 1, None, None]
    return torch.stack([x, y, torch.ones_like(x)], -1).flatten(1, 2) @ world_from_cam[:, :3, :3].transpose(-1, -2)


def shade_rays(w: Worlds, origin: Tensor, direction: Tensor, focal: Tensor) -> tuple[Tensor, Tensor]:
    """What rays see; fuses well under ``torch.compile``.

    Args:
        w: the worlds.
        origin: ``[B, 3]``; direction: ``[B, R, 3]`` from :func:`view_rays`.
        focal: ``[B]`` in pixels, for the size of a pixel on a surface.

    Returns:
        rgb ``[B, R, 3]`` in [0, 1] and depth ``[B, R]`` (z, metres).
    """
    depth, hit = _cast(w, origin, direction)
    safe = torch.where(direction.abs() < 1e-9, torch.full_like(direction, 1e-9), direction)
    wall_depth, wall_axis = ((safe.sign() * w.room[:, None] - origin[:, None]) / safe).min(-1)
    is_wall = wall_depth < depth
    depth = torch.minimum(depth, wall_depth)
    point = origin[:, None] + depth[..., None] * direction

    uv, normal, surface = _surface(w, point, direction, hit, is_wall, wall_axis)
    batch = torch.arange(origin.shape[0], device=origin.device)[:, None]
    scale = w.texture_scale[batch, surface]
    cosine = (normal * direction).sum(-1).abs() / direction.norm(dim=-1)
    footprint = depth / focal[:, None] / scale / cosine.clamp_min(0.15).sqrt()
    uv = uv / scale[..., None] + w.texture_shift[batch, surface]
    albedo = sample_textures(w.bank, w.texture[batch, surface], uv, footprint) * w.tint[batch, surface]

    radiance = (albedo * _light(w, point, normal)).clamp_min(1e-4)
    rgb = (1 - torch.exp(-1.6 * w.gain[:, None, None] * radiance)).pow(w.gamma[:, None, None])
    return rgb, depth


def render_view(
    w: Worlds, world_from_cam: Tensor, K: Tensor, size: tuple[int, int], shade: Shade = shade_rays
) -> tuple[Tensor, Tensor]:
    """One view of each world.

    Args:
        w: the worlds.
        world_from_cam: ``[B, 4, 4]``, OpenCV axes.
        K: ``[B, 3, 3]`` in pixels of ``size`` = (H, W).
        shade: :func:`shade_rays` or a compiled version of it.

    Returns:
        rgb ``[B, 3, H, W]`` in [0, 1] and depth ``[B, H, W]`` (z, metres).
    """
    rgb, depth = shade(w, world_from_cam[:, :3, 3], view_rays(world_from_cam, K, size), K[:, 0, 0])
    return rgb.unflatten(1, size).permute(0, 3, 1, 2).contiguous(), depth.unflatten(1, size)


def _surface(
    w: Worlds, point: Tensor, direction: Tensor, hit: Tensor, is_wall: Tensor, wall_axis: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Texture plane coordinates in metres ``[B, R, 2]``, world normals ``[B, R, 3]`` and surface numbers ``[B, R]``."""
    batch = torch.arange(point.shape[0], device=point.device)[:, None]
    rotation, extent = w.rotation[batch, hit], w.extent[batch, hit]
    local = _turned(rotation.transpose(-1, -2), point - w.centre[batch, hit])
    unit = local / extent
    zero = torch.zeros_like(unit[..., 0])
    box = torch.where(unit.abs() >= unit.abs().amax(-1, keepdim=True), unit.sign(), 0.0)
    ball = unit / extent
    cap = torch.stack([zero, unit[..., 1].sign(), zero], -1)
    tube = torch.where(unit[..., 1:2].abs() > 0.9995, cap, torch.stack([ball[..., 0], zero, ball[..., 2]], -1))
    is_ball, is_tube = ((hit >= BOXES) & (hit < BOXES + ELLIPSOIDS))[..., None], (hit >= BOXES + ELLIPSOIDS)[..., None]
    local_normal = torch.where(is_ball, ball, torch.where(is_tube, tube, box))
    normal = _turned(rotation, local_normal)

    side = torch.gather(direction, -1, wall_axis[..., None]).sign()
    wall_normal = torch.zeros_like(point).scatter(-1, wall_axis[..., None], -side)
    wall = is_wall[..., None]
    normal = torch.where(wall, wall_normal, normal)
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp_min(1e-9)
    local, local_normal = torch.where(wall, point, local), torch.where(wall, wall_normal, local_normal)

    axis = local_normal.abs().argmax(-1, keepdim=True)
    uv = torch.cat([torch.gather(local, -1, (axis + 1) % 3), torch.gather(local, -1, (axis + 2) % 3)], -1)
    face = OBJECTS + 2 * wall_axis + (side[..., 0] > 0)
    return uv, normal, torch.where(is_wall, face, hit)


def _light(w: Worlds, point: Tensor, normal: Tensor) -> Tensor:
    """Ambient light with darker corners, plus one lamp with shadows, ``[B, R, 3]``."""
    to_point = point - w.light[:, None]
    blocked_at, _ = _cast(w, w.light, to_point)
    lit = (blocked_at > 0.999).float()[..., None]
    distance = to_point.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    facing = (-(normal * to_point).sum(-1, keepdim=True) / distance).clamp_min(0)
    reach = w.room.norm(dim=-1)[:, None, None]
    fall_off = (reach / (distance + 0.4 * reach)) ** 1.5
    corner = (1 - point.abs() / w.room[:, None]).clamp(0, 0.3).sort(-1).values[..., 1:].sum(-1, keepdim=True) / 0.6
    upward = 0.75 - 0.25 * normal[..., 1:2]
    return w.ambient[:, None] * upward * (0.65 + 0.35 * corner) + 0.8 * w.lamp[:, None] * lit * facing * fall_off
