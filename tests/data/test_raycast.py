"""The ray caster against closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fvgen.data.synthetic.world as world_module
from fvgen.data.synthetic.depth import backproject, seen_by
from fvgen.data.synthetic.pairs import intrinsics
from fvgen.data.synthetic.raycast import _cast, _light, _surface, render_view, view_rays
from fvgen.data.synthetic.world import BOXES, ELLIPSOIDS, OBJECTS, Paths, Worlds, sample_paths, sample_worlds

FIRST_BALL, FIRST_TUBE = BOXES, BOXES + ELLIPSOIDS
SIZE = (40, 64)


@pytest.fixture(scope="module")
def paths() -> Paths:
    return sample_paths(torch.arange(3), 4)


@pytest.fixture(scope="module")
def worlds(paths: Paths) -> Worlds:
    return sample_worlds(torch.arange(3), paths)


@pytest.fixture
def empty(worlds: Worlds) -> Worlds:
    """One world whose objects are specks behind the ceiling, in a room of 6 x 4 x 8 metres."""
    one = {name: getattr(worlds, name)[:1].clone() for name in worlds.__dataclass_fields__ if name != "bank"}
    one |= {
        "centre": torch.tensor([0.0, -50.0, 0.0]).expand(1, OBJECTS, 3).clone(),
        "extent": torch.full((1, OBJECTS, 3), 1e-4),
        "rotation": torch.eye(3).expand(1, OBJECTS, 3, 3).clone(),
        "room": torch.tensor([[3.0, 2.0, 4.0]]),
    }
    return replace(worlds, **one)


def _with(
    world: Worlds, number: int, centre: tuple[float, ...], extent: tuple[float, ...], rotation: Tensor | None = None
) -> Worlds:
    world.centre[0, number], world.extent[0, number] = torch.tensor(centre), torch.tensor(extent)
    if rotation is not None:
        world.rotation[0, number] = rotation
    return world


def _hit(world: Worlds, *directions: tuple[float, float, float]) -> list[float]:
    return _cast(world, torch.zeros(1, 3), torch.tensor([directions]).float())[0][0].tolist()


def test_box(empty: Worlds) -> None:
    world = _with(empty, 0, (0.2, 0.0, 2.0), (0.5, 0.4, 0.3))
    front, aside, behind = _hit(world, (0, 0, 1), (0.5, 0, 1), (0, 0, -1))
    assert front == pytest.approx(1.7, rel=1e-6)
    assert aside > 1e8  # passes x = 0.85 > 0.7 at the front and never enters
    assert behind > 1e8
    world = _with(empty, 0, (0.0, 0.0, 2.0), (0.5, 0.5, 0.5), _turn(math.pi / 4))
    assert _hit(world, (0, 0, 1))[0] == pytest.approx(2 - 0.5 * math.sqrt(2), rel=1e-6)


def _turn(angle: float) -> Tensor:
    c, s = math.cos(angle), math.sin(angle)
    return torch.tensor([[c, 0, s], [0, 1.0, 0], [-s, 0, c]])


def test_ellipsoid(empty: Worlds) -> None:
    world = _with(empty, FIRST_BALL, (0.0, 0.3, 2.0), (0.5, 0.5, 0.8))
    # (0.3 / 0.5)^2 + (dz / 0.8)^2 = 1  =>  dz = 0.64
    assert _hit(world, (0, 0, 1))[0] == pytest.approx(2 - 0.64, rel=1e-6)
    assert _hit(world, (0, -0.2, 1))[0] > 1e8


def test_cylinder_side_and_cap(empty: Worlds) -> None:
    world = _with(empty, FIRST_TUBE, (0.0, 0.5, 2.0), (0.5, 0.3, 0.5))
    # its cap lies at y = 0.2 and z from 1.5 to 2.5: steep rays meet the cap, flat ones the side, flatter ones neither
    side, cap, over = _hit(world, (0, 0.25, 1), (0, 0.1, 1), (0, 0.05, 1))
    assert side == pytest.approx(1.5, rel=1e-6)
    assert cap == pytest.approx(2.0, rel=1e-6)
    assert over > 1e8


def test_nearest_of_several_objects(empty: Worlds) -> None:
    world = _with(empty, 0, (0.0, 0.0, 3.0), (0.5, 0.5, 0.5))
    world = _with(world, FIRST_BALL, (0.0, 0.0, 1.5), (0.25, 0.25, 0.25))
    distance, number = _cast(world, torch.zeros(1, 3), torch.tensor([[[0.0, 0, 1]]]))
    assert number.item() == FIRST_BALL
    assert distance.item() == pytest.approx(1.25, rel=1e-6)


def test_walls_of_an_empty_room(empty: Worlds) -> None:
    """Depth of every pixel of the view along +z from (1, 0.5, -1): the first of three planes."""
    pose = torch.eye(4)[None].clone()
    pose[0, :3, 3] = torch.tensor([1.0, 0.5, -1.0])
    K = intrinsics(torch.tensor([0.8]), SIZE)
    rgb, depth = render_view(empty, pose, K, SIZE)
    direction = view_rays(pose, K, SIZE)[0].double()
    x, y = direction[:, 0], direction[:, 1]
    to_x = torch.where(x > 0, 2.0 / x, -4.0 / x)
    to_y = torch.where(y > 0, 1.5 / y, -2.5 / y)
    expected = torch.minimum(torch.minimum(to_x, to_y), torch.full_like(x, 5.0)).view(SIZE)
    assert torch.allclose(depth[0].double(), expected, rtol=1e-5)
    assert rgb.shape == (1, 3, *SIZE)
    assert rgb.min() >= 0
    assert rgb.max() <= 1


def test_normals(empty: Worlds) -> None:
    turn = _turn(0.7)
    world = _with(empty, 0, (0.0, 0.0, 2.0), (0.5, 0.4, 0.3), turn)
    world = _with(world, FIRST_BALL, (1.0, 0.0, 2.0), (0.5, 0.25, 0.5))
    world = _with(world, FIRST_TUBE, (-1.0, 0.0, 2.0), (0.5, 0.3, 0.25))
    half = math.sqrt(0.5)
    cases = [
        (0, turn @ torch.tensor([0.1, 0.2, -0.3]) + world.centre[0, 0], turn @ torch.tensor([0, 0, -1.0])),
        # the gradient of x^2 / 0.25 + y^2 / 0.0625 at equal parts of both
        (FIRST_BALL, torch.tensor([1 + 0.5 * half, 0.25 * half, 2.0]), torch.tensor([2.0, 4.0, 0]) / math.sqrt(20)),
        (FIRST_TUBE, torch.tensor([-1 + 0.5 * half, 0.1, 2 + 0.25 * half]), torch.tensor([2.0, 0, 4.0]) / math.sqrt(20)),
        (FIRST_TUBE, torch.tensor([-0.9, -0.3, 2.0]), torch.tensor([0, -1.0, 0])),
    ]
    point = torch.stack([p for _, p, _ in cases])[None]
    hit = torch.tensor([[n for n, _, _ in cases]])
    no = torch.zeros(1, len(cases), dtype=torch.bool)
    _, normal, surface = _surface(world, point, point, hit, no, hit * 0)
    assert torch.allclose(normal[0], torch.stack([n for _, _, n in cases]), atol=1e-5)
    assert torch.equal(surface, hit)
    direction = torch.tensor([[[0.0, 1, 0], [-1.0, 0, 0]]])
    axis = torch.tensor([[1, 0]])
    _, normal, surface = _surface(world, direction, direction, axis * 0, ~no[:, :2], axis)
    assert torch.equal(normal[0], torch.tensor([[0.0, -1, 0], [1.0, 0, 0]]))  # into the room
    assert surface[0].tolist() == [OBJECTS + 3, OBJECTS]


def test_shadow(empty: Worlds) -> None:
    """A ball between the lamp and the floor darkens the floor behind it and nothing else."""
    world = replace(empty, light=torch.tensor([[0.0, -1.8, 0.0]]))
    floor = torch.tensor([[[0.0, 2.0, 0.0], [2.0, 2.0, 0.0]]])
    up = torch.tensor([[[0.0, -1.0, 0.0]]]).expand_as(floor)
    free = _light(world, floor, up)
    world = _with(world, FIRST_BALL, (0.0, 0.5, 0.0), (0.3, 0.3, 0.3))
    shaded = _light(world, floor, up)
    assert (shaded[0, 0] < free[0, 0] - 0.1).all()
    assert torch.equal(shaded[0, 1], free[0, 1])


def test_points_of_one_view_lie_on_the_surfaces_that_another_sees(worlds: Worlds, paths: Paths) -> None:
    """Rays from the other camera through the backprojected points end there, or before where something is in the way."""
    K = intrinsics(paths.focal, SIZE)
    _, depth = render_view(worlds, paths.world_from_cam[:, 0], K, SIZE)
    points = backproject(depth, K, paths.world_from_cam[:, 0]).flatten(1, 2)
    origin = paths.world_from_cam[:, 3, :3, 3]
    reached, _ = _cast(worlds, origin, points - origin[:, None])
    seen = reached > 0.99
    assert ((points.abs() - worlds.room[:, None]).amax(-1) < 1e-3).all()
    assert seen.float().mean() > 0.5
    # of points that nothing hides, more than 99 % have the depth that the other camera sees in that direction
    in_camera = (points - origin[:, None]) @ paths.world_from_cam[:, 3, :3, :3]
    direction = (points - origin[:, None]) / in_camera[..., 2:]
    ahead = in_camera[..., 2] > 0.1
    objects, _ = _cast(worlds, origin, direction)
    walls = ((direction.sign() * worlds.room[:, None] - origin[:, None]) / direction).amin(-1)
    there = torch.minimum(objects, walls)
    agrees = (there - in_camera[..., 2]).abs() < 1e-3 * in_camera[..., 2]
    assert agrees[seen & ahead].float().mean() > 0.99


def test_seen_by_closed_form() -> None:
    """A wall at depth 4, and for the other camera, one metre to the right, a plate at depth 2 over its left half."""
    size, K = (8, 8), intrinsics(torch.tensor([1.0]), (8, 8))
    here = torch.eye(4)[None]
    there = here.clone()
    there[0, 0, 3] = 1.0
    wall = torch.full((1, *size), 4.0)
    points = backproject(wall, K, here)
    assert torch.allclose(points[0, :, :, 2], torch.tensor(4.0))
    # a shift of one metre at depth 4 is 8 / 4 = 2 pixels to the left, so the two left columns leave the picture
    seen = seen_by(points, wall, K, there)
    assert not seen[..., :2].any()
    assert seen[..., 2:].all()
    plate = wall.clone()
    plate[..., :4] = 2.0
    assert seen_by(points, plate, K, there).nonzero()[:, 2].unique().tolist() == [6, 7]
    behind = there.clone()
    behind[0, :3, :3] = torch.diag(torch.tensor([-1.0, 1, -1]))
    assert not seen_by(points, wall, K, behind).any()


def test_cameras_and_objects_keep_their_distance(worlds: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world_module, "make_textures", lambda _random: worlds.bank)  # they take long and are not looked at
    seeds = torch.arange(40)
    paths = sample_paths(seeds, 8)
    rotation = paths.world_from_cam[..., :3, :3]
    assert torch.allclose(rotation.mT @ rotation, torch.eye(3).expand_as(rotation), atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(40, 8), atol=1e-5)
    centre = paths.world_from_cam[..., :3, 3]
    assert (centre.abs() <= paths.room[:, None] - 0.12 + 1e-5).all()
    assert (rotation[..., 1, 1] > 0.3).all()  # upright: the image's down is the world's down
    filled = sample_worlds(seeds, paths)
    gap = torch.cdist(filled.centre, centre).amin(-1) - filled.extent.norm(dim=-1)
    solid = filled.extent.amax(-1) > 1e-3
    assert (gap[solid] >= 0.35).all()
    assert solid.float().mean() > 0.5
