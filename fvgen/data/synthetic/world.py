"""Seeded rooms with furniture-like objects of three primitive types, and camera paths through them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.data.synthetic.textures import TEXTURES, TextureBank, make_textures
from fvgen.utils.hash_random import HashRandom

BOXES, ELLIPSOIDS, CYLINDERS = 14, 8, 6
OBJECTS = BOXES + ELLIPSOIDS + CYLINDERS
SURFACES = OBJECTS + 6  # the six faces of the room come last


@dataclass(frozen=True)
class Paths:
    """Camera paths, with the point looked at and the room around them.

    Attributes:
        world_from_cam: ``[B, T, 4, 4]``, OpenCV axes, metres.
        focus, room: ``[B, 3]`` point looked at; half extents of the room.
        focal: ``[B]`` focal length in units of the image's long side.
    """

    world_from_cam: Tensor
    focus: Tensor
    room: Tensor
    focal: Tensor


@dataclass(frozen=True)
class Worlds:
    """``B`` worlds; y points down, the floor is at ``y = room[1]``, lengths are metres.

    Attributes:
        room: ``[B, 3]`` half extents of the room, centred at the origin.
        centre, rotation, extent: pose ``[B, N, 3]``, ``[B, N, 3, 3]`` (world from object) and half extents ``[B, N, 3]`` of the
            objects, ordered boxes, ellipsoids, cylinders (axis y).
        texture, texture_scale: ``[B, N + 6]`` texture of each surface, metres per period.
        texture_shift: ``[B, N + 6, 2]`` in periods.
        tint: ``[B, N + 6, 3]`` colour factor.
        light, lamp, ambient: ``[B, 3]`` position of the lamp, its colour, the ambient colour.
        gain, gamma: ``[B]`` camera response.
        bank: the textures.
    """

    room: Tensor
    centre: Tensor
    rotation: Tensor
    extent: Tensor
    texture: Tensor
    texture_scale: Tensor
    texture_shift: Tensor
    tint: Tensor
    light: Tensor
    lamp: Tensor
    ambient: Tensor
    gain: Tensor
    gamma: Tensor
    bank: TextureBank


def sample_paths(seeds: Tensor, frames: int) -> Paths:
    """Smooth paths with parallax: a Bézier curve around a point of interest at 1 to 3 m, with a wandering view direction.

    Args:
        seeds: ``[B]`` int64.
        frames: cameras per path.
    """
    random = HashRandom(seeds, stream=0)
    device = seeds.device
    large = (random.uniform(1) < 0.15).float()
    room = random.uniform(3, low=2.0, high=4.5) * torch.tensor([1.0, 0.5, 1.0], device=device) * (1 + 2 * large)
    distance = torch.exp(random.uniform(1, low=math.log(0.9), high=math.log(3.2)))
    azimuth = random.uniform(1, high=2 * math.pi)
    elevation = random.uniform(1, low=-0.15, high=0.75)
    outward = torch.cat([elevation.cos() * azimuth.cos(), -elevation.sin(), elevation.cos() * azimuth.sin()], -1)
    focus = (random.uniform(3) * 2 - 1) * 0.4 * room

    angle = torch.exp(random.uniform(1, low=math.log(0.06), high=math.log(0.75)))
    across = random.normal(3)
    across = across - (across * outward).sum(-1, keepdim=True) * outward
    across = F.normalize(across * torch.tensor([1.0, 0.45, 1.0], device=device), dim=-1)
    travel = distance * angle * (across + outward * random.uniform(1, low=-0.35, high=0.35))
    bend = 0.12 * random.normal(3) * travel.norm(dim=-1, keepdim=True)
    u = torch.linspace(0, 1, frames, device=device)[None, :, None]
    centre = (focus + distance * outward)[:, None] + travel[:, None] * u + 2 * u * (1 - u) * bend[:, None]
    limit = (room - 0.12)[:, None]
    centre = torch.maximum(torch.minimum(centre, limit), -limit)

    first, last = random.normal(3)[:, None], random.normal(3)[:, None]
    look = focus[:, None] + 0.2 * distance[:, None] * (first * (1 - u) + last * u)
    forward = F.normalize(look - centre, dim=-1)
    roll = 0.06 * random.normal(1)
    down = torch.cat([roll.sin(), roll.cos(), torch.zeros_like(roll)], -1)[:, None].expand_as(forward)
    right = F.normalize(torch.linalg.cross(down, forward), dim=-1)
    pose = torch.eye(4, device=device).repeat(seeds.shape[0], frames, 1, 1)
    pose[..., :3, 0] = right
    pose[..., :3, 1] = torch.linalg.cross(forward, right)
    pose[..., :3, 2] = forward
    pose[..., :3, 3] = centre
    return Paths(pose, focus, room, random.uniform(1, low=0.7, high=1.25)[:, 0])


def _rotations(random: HashRandom, count: int, tilt: Tensor) -> Tensor:
    """``[B, count, 3, 3]``: a random turn about the vertical, then ``tilt`` radians about a random horizontal axis."""
    yaw, axis = random.uniform(count, high=2 * math.pi), random.uniform(count, high=2 * math.pi)
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    turn = torch.stack([yaw.cos(), zero, yaw.sin(), zero, one, zero, -yaw.sin(), zero, yaw.cos()], -1).unflatten(-1, (3, 3))
    x, z = axis.cos(), axis.sin()
    skew = torch.stack([zero, -z, zero, z, zero, -x, zero, x, zero], -1).unflatten(-1, (3, 3))
    sine, cosine = tilt.sin()[..., None, None], tilt.cos()[..., None, None]
    return (torch.eye(3, device=yaw.device) + sine * skew + (1 - cosine) * skew @ skew) @ turn


def sample_worlds(seeds: Tensor, paths: Paths) -> Worlds:
    """Fills the rooms around camera paths; an object that comes too near to a camera is shrunk to nothing.

    Args:
        seeds: ``[B]`` int64.
        paths: the cameras that must stay free, and the point around which half of the objects gather.
    """
    random = HashRandom(seeds, stream=1)
    b, n, device = seeds.shape[0], OBJECTS, seeds.device
    room = paths.room

    near = random.uniform(n) < 0.55
    gathered = random.normal(n, 3) * 0.55 + paths.focus[:, None]
    scattered = (random.uniform(n, 3) * 2 - 1) * room[:, None]
    large = (random.uniform(n, 1) < 0.3).float()
    extent = torch.exp(random.uniform(n, 3, low=math.log(0.05), high=math.log(0.30))) * (1 + 2.2 * large)
    slab = random.uniform(n, 3) < 0.12
    extent = torch.where(slab, extent * 0.2, extent).clamp_min(0.01)
    standing = random.uniform(n) < 0.45
    tilt = random.uniform(n, high=1.2) * (~standing)
    centre = torch.where(near[..., None], gathered, scattered)
    on_floor = torch.stack([centre[..., 0], room[:, None, 1] - extent[..., 1], centre[..., 2]], -1)
    centre = torch.where((standing & ~near)[..., None], on_floor, centre)
    centre = torch.maximum(torch.minimum(centre, room[:, None]), -room[:, None])
    rotation = _rotations(random, n, tilt)

    gap = torch.cdist(centre, paths.world_from_cam[..., :3, 3]).amin(-1) - extent.norm(dim=-1)
    extent = torch.where((gap < 0.35)[..., None], torch.full_like(extent, 1e-4), extent)

    scale = torch.exp(random.uniform(SURFACES, low=math.log(0.35), high=math.log(2.2)))
    scale = torch.cat([scale[:, :n], 2 * scale[:, n:]], 1)
    light = (random.uniform(3) * 2 - 1) * 0.8 * room
    light = torch.stack([light[:, 0], -0.9 * room[:, 1], light[:, 2]], -1)
    warmth = 0.08 * random.normal(1)
    return Worlds(
        room=room,
        centre=centre,
        rotation=rotation,
        extent=extent,
        texture=random.integers(TEXTURES, SURFACES) + TEXTURES * torch.arange(b, device=device)[:, None],
        texture_scale=scale,
        texture_shift=random.uniform(SURFACES, 2),
        tint=(1 + 0.12 * random.normal(SURFACES, 3)).clamp(0.5, 1.4) * random.uniform(SURFACES, 1, low=0.7, high=1.15),
        light=light,
        lamp=torch.cat([1 + warmth, torch.ones_like(warmth), 1 - warmth], -1) * random.uniform(1, low=0.5, high=1.1),
        ambient=random.uniform(1, low=0.5, high=1.0).expand(-1, 3),
        gain=random.uniform(1, low=0.8, high=1.4)[:, 0],
        gamma=random.uniform(1, low=0.65, high=1.0)[:, 0],
        bank=make_textures(HashRandom(seeds, stream=2)),
    )
