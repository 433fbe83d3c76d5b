"""Photos to scenes by a network that knows the answer: cameras, units, crops; with and without known cameras."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fvgen.geometry.conventions import invert_rigid
from fvgen.geometry.dust3r.estimate import dust3r_scene
from fvgen.geometry.dust3r.known import depth_factor
from fvgen.geometry.dust3r.pairs import neighbour_pairs
from fvgen.geometry.dust3r.pinhole import intrinsics, transform, unproject
from fvgen.geometry.trajectory import target_cameras
from fvgen.types import Cameras, ImageSet, Scene
from fvgen.utils.errors import UserError
from tests.geometry.synthetic import pose
from tests.reference_dust3r import KnowingNetwork

# The photos are scaled to 64 x 54; the network sees the middle 48 rows.
PHOTO, WHOLE, SEEN, TOP = (108, 128), (54, 64), (48, 64), 3
FOCAL = 60.0


def _world(count: int, focal: float = FOCAL) -> tuple[ImageSet, Cameras, torch.Tensor, KnowingNetwork]:
    """Photos, cameras of what the network sees, its depth, the network."""
    generator = torch.Generator().manual_seed(0)
    poses = [pose((0.4 * i + 1, 0.1 * i, 0.2), (2.0 * i, 5.0 - 4.0 * i, 0.0)) for i in range(count)]
    K = intrinsics(focal, SEEN).float().expand(count, 3, 3)
    cameras = Cameras(K, torch.stack([torch.from_numpy(p) for p in poses]).float(), SEEN)
    depth = 3 + torch.rand(count, *SEEN, generator=generator, dtype=torch.float64)
    images = ImageSet(torch.rand(count, 3, *PHOTO, generator=generator), tuple(f"{i}.png" for i in range(count)))
    return images, cameras, depth, KnowingNetwork(cameras, depth, max(WHOLE))


def _photo_cameras(seen: Cameras) -> Cameras:
    """Of the photos that were scaled by one half and cut at the top and the bottom."""
    K = seen.K.clone()
    K[:, 1, 2] += TOP
    K[:, :2] *= 2
    return Cameras(K, seen.world_from_cam, PHOTO)


def _check_points(scene: Scene, cameras: Cameras, depth: torch.Tensor, factor: float, world: torch.Tensor) -> None:
    """Points are the true ones in the frame ``world``, times a factor; the margin that the network did not see has none."""
    inner = slice(TOP, TOP + SEEN[0])
    assert scene.images.size == tuple(scene.confidence.shape[1:]) == scene.cameras.image_size == WHOLE
    assert (scene.confidence[:, inner] > 0).all()
    assert (scene.confidence[:, :TOP] == 0).all()
    assert (scene.confidence[:, TOP + SEEN[0] :] == 0).all()
    for n in range(len(depth)):
        points = unproject(depth[n], cameras.K[n], cameras.world_from_cam[n])
        expected = factor * transform(invert_rigid(world.double()), points)
        torch.testing.assert_close(scene.points[n, inner].double(), expected, rtol=0.0, atol=2e-3)


def _check_cameras(scene: Scene, cameras: Cameras, factor: float, world: torch.Tensor) -> None:
    expected = invert_rigid(world.double()) @ cameras.world_from_cam.double()
    expected[:, :3, 3] *= factor
    torch.testing.assert_close(scene.cameras.world_from_cam.double(), expected, rtol=0.0, atol=1e-3)
    K = cameras.K.clone()
    K[:, 1, 2] += TOP
    torch.testing.assert_close(scene.cameras.K, K, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_cameras_are_found(count: int) -> None:
    """The first photo's camera is the world and the median depth of its points the unit, however many photos there are."""
    images, cameras, depth, network = _world(count)
    # exact pairs leave the alignment nothing to do, and Adam would move away from the optimum by its step
    scene = dust3r_scene(network, images, steps=0)
    factor, world = float(1 / depth[0].median()), cameras.world_from_cam[0]
    _check_cameras(scene, cameras, factor, world)
    _check_points(scene, cameras, depth, factor, world)
    assert network.seen == count
    assert scene.quality.estimator == "dust3r, estimated cameras"
    assert scene.quality.coverage == pytest.approx((SEEN[0] / WHOLE[0],) * count)


@pytest.mark.parametrize("count", [2, 4])
def test_known_cameras_give_world_and_unit(count: int) -> None:
    images, cameras, depth, network = _world(count)
    scene = dust3r_scene(network, images, _photo_cameras(cameras))
    _check_cameras(scene, cameras, 1.0, torch.eye(4))
    _check_points(scene, cameras, depth, 1.0, torch.eye(4))
    assert scene.quality.estimator == "dust3r, given cameras"
    assert scene.quality.view_angle_deg == pytest.approx(20**0.5, abs=0.1)


def test_one_photo_with_its_camera_keeps_the_networks_unit() -> None:
    images, cameras, depth, network = _world(1)
    scene = dust3r_scene(network, images, _photo_cameras(cameras))
    _check_points(scene, cameras, depth, 1.0, torch.eye(4))


def test_a_path_of_one_photo() -> None:
    images, _, _, network = _world(1)
    path = target_cameras(dust3r_scene(network, images), "orbit:deg=10", 5)
    angle = torch.rad2deg((path.world_from_cam[0, :3, 2] @ path.world_from_cam[-1, :3, 2]).acos())
    assert float(angle) == pytest.approx(10, abs=0.1)


def test_factor_survives_wrong_points() -> None:
    _, cameras, depth, _ = _world(2)
    poses = cameras.world_from_cam.double()
    points = transform(invert_rigid(poses[0]), unproject(depth[1], cameras.K[1], poses[1])) / 2.5
    points[:15] += 1.0
    points[20] = float("nan")
    sure = torch.full(SEEN, 9.0)
    assert depth_factor(points, sure, invert_rigid(poses[1]) @ poses[0], cameras.K[1], "") == pytest.approx(2.5, rel=1e-4)


def test_unsure_pixels_do_not_set_the_size() -> None:
    """Most points of the other photo are wrong and unsure; where none is sure, all count."""
    _, cameras, depth, _ = _world(2)
    poses = cameras.world_from_cam.double()
    points = transform(invert_rigid(poses[0]), unproject(depth[1], cameras.K[1], poses[1])) / 2.5
    points[:30] *= 3.0
    confidence = torch.full(SEEN, 9.0)
    confidence[:30] = 1.5
    second_from_first = invert_rigid(poses[1]) @ poses[0]
    assert depth_factor(points, confidence, second_from_first, cameras.K[1], "") == pytest.approx(2.5, rel=1e-4)
    all_unsure = torch.full(SEEN, 1.5)
    assert depth_factor(points, all_unsure, second_from_first, cameras.K[1], "") == pytest.approx(2.5 / 3, rel=1e-4)


def test_unsure_pixels_do_not_set_the_size_of_a_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    images, cameras, depth, network = _world(2)
    decode = network.decode

    def doubtful(first, second):
        maps = decode(first, second)
        maps[1].points[:, :30] *= 3.0
        for each in maps:
            each.confidence[:, :30] = 1.5
        return maps

    monkeypatch.setattr(network, "decode", doubtful)
    _check_points(dust3r_scene(network, images, _photo_cameras(cameras)), cameras, depth, 1.0, torch.eye(4))


def test_low_confidence_becomes_a_hole(monkeypatch: pytest.MonkeyPatch) -> None:
    images, _, _, network = _world(2)
    decode = network.decode

    def doubtful(first, second):
        maps = decode(first, second)
        for each in maps:
            each.confidence[:, :10] = 1.05
        return maps

    monkeypatch.setattr(network, "decode", doubtful)
    scene = dust3r_scene(network, images, min_confidence=1.1)
    assert (scene.confidence[:, : TOP + 10] == 0).all()
    assert (scene.confidence[:, TOP + 10 : TOP + SEEN[0]] > 0).all()
    nothing = _world(2)
    monkeypatch.setattr(nothing[3], "decode", doubtful)
    covered = dust3r_scene(nothing[3], nothing[0], _photo_cameras(nothing[1]), min_confidence=100.0)
    assert covered.quality.coverage == (0.0, 0.0)
    assert "only 0% of photo 1" in covered.quality.warnings[0]


def test_the_limit_for_points_does_not_reach_the_pose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most pixels are unsure and look as if both photos had been taken from one place."""
    images, cameras, depth, network = _world(2)
    decode, still = network.decode, [unproject(d, K, torch.eye(4)) for d, K in zip(depth, cameras.K, strict=True)]
    unsure = slice(0, 29)

    def doubtful(first, second):
        maps = decode(first, second)
        maps[1].points[0, unsure] = still[second.index][unsure].float()
        for each in maps:
            each.confidence[:, unsure] = 1.5
        return maps

    monkeypatch.setattr(network, "decode", doubtful)
    scene = dust3r_scene(network, images)
    seen = scene.confidence[:, TOP : TOP + SEEN[0]]
    assert (seen[:, unsure] == 1.5).all()
    found = invert_rigid(scene.cameras.world_from_cam[0].double()) @ scene.cameras.world_from_cam[1].double()
    expected = invert_rigid(cameras.world_from_cam[0].double()) @ cameras.world_from_cam[1].double()
    torch.testing.assert_close(found[:3, :3], expected[:3, :3], rtol=0.0, atol=1e-5)  # points are float32
    towards = expected[:3, 3] / expected[:3, 3].norm()
    torch.testing.assert_close(found[:3, 3] / found[:3, 3].norm(), towards, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(("count", "given"), [(1, False), (2, False), (3, False), (2, True)])
def test_points_of_little_confidence_are_left_out_unasked(monkeypatch: pytest.MonkeyPatch, count: int, given: bool) -> None:
    """The limit is log 3 = 1.0986."""
    images, cameras, _, network = _world(count)
    decode = network.decode

    def doubtful(first, second):
        maps = decode(first, second)
        for each in maps:
            each.confidence[:, :5], each.confidence[:, 5:10] = 1.09, 1.11
        return maps

    monkeypatch.setattr(network, "decode", doubtful)
    scene = dust3r_scene(network, images, _photo_cameras(cameras) if given else None, steps=0)
    seen = scene.confidence[:, TOP : TOP + SEEN[0]]
    assert (seen[:, :5] == 0).all()
    # among three photos some of these points float in front of surer ones
    assert (seen[:, 5:10] > 0).float().mean() > (0.3 if count == 3 else 0.99)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("focal", "factor"), [(15.0, 0.5), (250.0, 3.5)])
def test_focal_lengths_are_limited(count: int, focal: float, factor: float) -> None:
    """To one half and 3.5 times that of a field of view of 60 degrees, as in ViewCrafter."""
    images, _, _, network = _world(count, focal)
    found = dust3r_scene(network, images, steps=0).cameras.K[:, 0, 0]
    limit = factor * max(SEEN) / (2 * 3**-0.5)
    torch.testing.assert_close(found, torch.full((count,), limit), rtol=1e-5, atol=0.0)


def test_bad_cameras_are_refused() -> None:
    images, cameras, _, network = _world(2)
    given = _photo_cameras(cameras)
    with pytest.raises(UserError, match="do not fit the photos"):
        dust3r_scene(network, images, cameras)
    one_place = replace(given, world_from_cam=given.world_from_cam[[0, 0]])
    with pytest.raises(UserError, match="photos 1 and 2 stand in one place"):
        dust3r_scene(_world(2)[3], images, one_place)
    behind = given.world_from_cam.clone()
    behind[1, :3, 3] = 2 * behind[0, :3, 3] - behind[1, :3, 3]
    with pytest.raises(UserError, match="contradict what photos"):
        dust3r_scene(_world(2)[3], images, replace(given, world_from_cam=behind))


def test_pairs_of_neighbours() -> None:
    assert neighbour_pairs(1) == [(0, 0)]
    assert neighbour_pairs(3) == [(0, 1), (1, 2), (1, 0), (2, 1)]
