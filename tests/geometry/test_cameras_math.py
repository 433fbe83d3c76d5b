"""Resizing, conventions, rectification and splines: each against a formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from fvgen.geometry import conventions as cv
from fvgen.geometry import features as ft
from fvgen.geometry import se3
from fvgen.geometry.rectify import apply, rectify
from fvgen.geometry.resize import fit, limit_long_side
from fvgen.types import Cameras, ImageSet


def random_poses(count: int, seed: int = 0) -> torch.Tensor:
    rotations = torch.from_numpy(Rotation.random(count, random_state=seed).as_matrix())
    return cv.rigid(rotations, torch.from_numpy(np.random.default_rng(seed).normal(size=(count, 3))))


def spot(xy: tuple[float, float], size: tuple[int, int]) -> ImageSet:
    v, u = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    blob = torch.exp(-((u - xy[0]) ** 2 + (v - xy[1]) ** 2) / (2 * 4.0**2))
    return ImageSet(blob.expand(1, 3, *size).clone(), ("a",), (100.0,))


def centroid(images: ImageSet) -> tuple[float, float]:
    weight = images.rgb[0, 0].double()
    v, u = torch.meshgrid(torch.arange(weight.shape[0]) + 0.5, torch.arange(weight.shape[1]) + 0.5, indexing="ij")
    return float((u * weight).sum() / weight.sum()), float((v * weight).sum() / weight.sum())


@pytest.mark.parametrize("target", [(60, 100), (100, 60), (97, 97), (53, 121), (240, 320), (33, 40)])
def test_a_point_keeps_projecting_onto_its_content(target: tuple[int, int]) -> None:
    K = torch.tensor([[[90.0, 0, 82.3], [0, 95.0, 57.1], [0, 0, 1]]])
    point = torch.tensor([0.05, 0.08, 1.0])
    x, y, _ = (K[0] @ point).tolist()
    cameras = Cameras(K, torch.eye(4)[None], (120, 160))
    images, resized = fit(spot((x, y), (120, 160)), cameras, target)
    assert resized is not None
    assert images.size == target == resized.image_size
    got = centroid(images)
    want = (resized.K[0] @ point).tolist()
    assert got[0] == pytest.approx(want[0], abs=0.03)
    assert got[1] == pytest.approx(want[1], abs=0.03)


def test_long_side_limit() -> None:
    images = spot((20, 20), (120, 160))
    small, cameras = limit_long_side(images, Cameras(torch.eye(3)[None] * 80, torch.eye(4)[None], (120, 160)), 80)
    assert small.size == (60, 80)
    assert small.focal_px == (pytest.approx(50.0),)
    assert cameras is not None
    assert cameras.K[0, 0, 0] == 40
    assert limit_long_side(images, None, 400)[0] is images


def test_frame_conversions_invert_each_other() -> None:
    poses = random_poses(5)
    torch.testing.assert_close(cv.opencv_from_opengl(cv.opengl_from_opencv(poses)), poses)
    torch.testing.assert_close(cv.opencv_from_pytorch3d(*cv.pytorch3d_from_opencv(poses)), poses)
    torch.testing.assert_close(cv.invert_rigid(poses) @ poses, torch.eye(4).double().expand(5, 4, 4))


def test_pytorch3d_sees_x_left_and_y_up() -> None:
    pose = random_poses(1)
    local = torch.tensor([0.3, -0.2, 2.0], dtype=torch.float64)
    world = pose[0, :3, :3] @ local + pose[0, :3, 3]
    R, T = cv.pytorch3d_from_opencv(pose)
    torch.testing.assert_close(world @ R[0] + T[0], local * torch.tensor([-1.0, -1.0, 1.0]).double())
    ndc = cv.ndc_from_pixels(torch.tensor([[0.0, 0.0], [320.0, 240.0], [160.0, 120.0]]), (240, 320))
    torch.testing.assert_close(ndc, torch.tensor([[4 / 3, 1.0], [-4 / 3, -1.0], [0.0, 0.0]]))


def test_colmap_quaternion() -> None:
    turn = Rotation.random(4, random_state=3)
    wxyz = torch.from_numpy(np.roll(turn.as_quat(), 1, axis=1)) * 3.0
    torch.testing.assert_close(cv.rotation_from_quaternion(wxyz), torch.from_numpy(turn.as_matrix()))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_rectified_points_share_a_row_and_disparity_follows_depth(seed: int) -> None:
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(rng.normal(size=(2, 3)) * 0.1).as_matrix()
    angle = rng.uniform(0, 2 * math.pi)
    poses[1, :3, 3] = rng.uniform(0.2, 1.0) * np.array([math.cos(angle), math.sin(angle), rng.uniform(-0.5, 0.5)])
    K = [np.array([[f, 0, 160 + rng.normal()], [0, f + 3, 120], [0, 0, 1.0]]) for f in (300.0, 330.0)]
    points = rng.uniform([-1, -1, 4], [1, 1, 8], size=(50, 3))
    rect = rectify((K[0], K[1]), (poses[0], poses[1]), (240, 320))
    xy = [apply(h, ft.project(k, p, points)[0]) for h, k, p in zip(rect.from_photo, K, poses, strict=True)]
    np.testing.assert_allclose(xy[0][:, 1], xy[1][:, 1], atol=1e-6)
    z = (points - poses[0, :3, 3]) @ rect.rotation[2]
    np.testing.assert_allclose(xy[0][:, 0] - xy[1][:, 0], rect.focal * rect.baseline / z + rect.offset, atol=1e-6)
    triangulated = ft.triangulate(
        K[0], poses[0], K[1], poses[1], *(ft.project(k, p, points)[0] for k, p in zip(K, poses, strict=True))
    )
    np.testing.assert_allclose(triangulated, points, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_spline_passes_through_the_poses_and_stays_rigid(seed: int, count: int) -> None:
    poses = random_poses(count, seed)
    at_knots = se3.spline(poses, torch.arange(count, dtype=torch.float64))
    torch.testing.assert_close(at_knots, poses, rtol=0, atol=1e-9)
    path = se3.spline(poses, torch.linspace(0, count - 1, 37, dtype=torch.float64))
    R = path[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).double().expand(37, 3, 3), rtol=0, atol=1e-9)
    assert (torch.linalg.det(R) > 0).all()


def test_spline_of_two_poses_has_constant_speed() -> None:
    poses = random_poses(2)
    path = se3.spline(poses, torch.linspace(0, 1, 11, dtype=torch.float64))
    steps = path[1:, :3, 3] - path[:-1, :3, 3]
    torch.testing.assert_close(steps, steps[:1].expand(10, 3))
    turns = path[:-1, :3, :3].mT @ path[1:, :3, :3]
    torch.testing.assert_close(turns, turns[:1].expand(10, 3, 3))
    torch.testing.assert_close(path, se3.interpolate_straight(*poses, torch.linspace(0, 1, 11, dtype=torch.float64)))


def test_spline_has_no_corner_at_a_photo() -> None:
    poses = random_poses(4, 5)
    e = 1e-4
    before, at, after = se3.spline(poses, torch.tensor([1 - e, 1.0, 1 + e], dtype=torch.float64))
    speed = (at - before) / e, (after - at) / e
    torch.testing.assert_close(speed[0], speed[1], rtol=0, atol=2e-2)
