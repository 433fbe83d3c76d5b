"""Focal length, pose and the two-view scene from point maps, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fvgen.geometry.dust3r.pairs import PairPrediction
from fvgen.geometry.dust3r.pinhole import camera_pose, estimate_focal, intrinsics, pose_and_focal, transform, unproject
from fvgen.geometry.dust3r.two_view import scene_of_pair
from fvgen.types import ImageSet
from fvgen.utils.errors import UserError
from tests import golden_dust3r as reference

pytestmark = pytest.mark.golden
LIMITS = (0.5, 3.5)


def _axes(values: dict[str, Tensor]) -> list[tuple[float, float]]:
    """Principal points with pixel centres at +0.5; the reference counts them from integer centres."""
    return [(x + 0.5, y + 0.5) for x, y in values["focal.in.pp"].tolist()]


@pytest.mark.usefixtures("golden_device")
@pytest.mark.parametrize(("limits", "name"), [(None, "focal.weiszfeld"), (LIMITS, "focal.weiszfeld.min0.5_max3.5")])
def test_focal(limits: tuple[float, float] | None, name: str) -> None:
    values = reference.tensors("geometry")
    found = [estimate_focal(p, axis, limits) for p, axis in zip(values["focal.in.pts3d"], _axes(values), strict=True)]
    torch.testing.assert_close(torch.tensor(found), values[name].cpu(), rtol=1e-5, atol=0.0)


def test_one_point_near_the_camera_spoils_the_focal_length() -> None:
    values = reference.tensors("geometry")
    points, expected = values["focal_degenerate.in.pts3d"], values["focal_degenerate.weiszfeld"]
    found = [estimate_focal(p, axis) for p, axis in zip(points, _axes(values), strict=True)]
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=0.0)
    assert found[1] < 0.01


def test_points_of_a_depth_map() -> None:
    values = reference.tensors("geometry", "depthmap_to_pts3d.")
    # the reference takes a focal length per pixel there: of a camera with focal length 1, x and y are divided by it
    for depth, focal, axis, expected in zip(*(values[k] for k in ("in.depth", "in.focal", "in.pp", "with_pp")), strict=True):
        K = torch.eye(3, dtype=torch.float64)
        K[:2, 2] = axis.double() + 0.5
        found = unproject(depth, K, torch.eye(4))
        found[..., :2] /= focal[..., None]
        torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("golden_device")
@pytest.mark.parametrize("suffix", ["", "_noisy"])
def test_pose(suffix: str) -> None:
    values = reference.tensors("geometry", "pnp.")
    points = values[f"in.pts3d_world{suffix}"]
    K = intrinsics(float(values["in.focal"]), tuple(points.shape[:2]))
    found = camera_pose(points, K, values["in.mask"], iterations=10)
    torch.testing.assert_close(found.float(), values[f"cam2world{suffix}"].cpu(), rtol=0.0, atol=2e-4)


@pytest.mark.usefixtures("golden_device")
def test_pose_with_unknown_focal_length() -> None:
    values = reference.tensors("geometry", "pnp.")
    pose, focal = pose_and_focal(values["in.pts3d_world"], values["in.mask"])
    expected_focal, expected = values["unknown_focal.focal"], values["unknown_focal.cam2world"].cpu()
    assert focal == pytest.approx(float(expected_focal), rel=1e-6)
    torch.testing.assert_close(pose.float(), expected, rtol=0.0, atol=2e-4)


def _pair() -> tuple[ImageSet, list[PairPrediction], dict[str, Tensor]]:
    v = reference.tensors("pair_viewer")
    parts = v["pred1_pts3d"], v["conf1"], v["pred2_pts3d_in_other_view"], v["conf2"]
    predictions = [PairPrediction(*edge, *(p[i] for p in parts)) for i, edge in enumerate(v["edges"].tolist())]
    return ImageSet(torch.rand(2, 3, *v["conf1"].shape[-2:])), predictions, v


@pytest.mark.parametrize("swapped", [False, True])
def test_scene_of_a_pair(swapped: bool) -> None:
    images, predictions, values = _pair()
    scene = scene_of_pair(images, predictions[::-1] if swapped else predictions)
    K = values["intrinsics"].clone()
    K[:, :2, 2] += 0.5  # from integer pixel centres
    torch.testing.assert_close(scene.cameras.K, K, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(scene.cameras.world_from_cam, values["cam2world"], rtol=0.0, atol=2e-4)
    torch.testing.assert_close(scene.points, values["pts3d"], rtol=0.0, atol=5e-4)
    assert torch.equal(scene.confidence > 0, values["masks"] & (values["depth"] > 0))
    for i in (0, 1):
        cam_from_world = torch.linalg.inv(scene.cameras.world_from_cam[i])
        depth = transform(cam_from_world, scene.points[i])[..., 2]
        torch.testing.assert_close(depth, values["depth"][i], rtol=0.0, atol=5e-4)


def test_points_fall_on_their_own_pixel_centres() -> None:
    images, predictions, _ = _pair()
    scene = scene_of_pair(images, predictions)
    height, width = images.size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    for i in (0, 1):
        seen = transform(torch.linalg.inv(scene.cameras.world_from_cam[i]), scene.points[i]) @ scene.cameras.K[i].T
        torch.testing.assert_close(seen[..., :2] / seen[..., 2:], torch.stack([x, y], dim=-1), rtol=0.0, atol=1e-3)


def test_a_spoiled_focal_length_is_reported() -> None:
    images, predictions, _ = _pair()
    spoiled = next(p for p in predictions if p.first == 1)
    spoiled.points_first[3, 5] = torch.tensor([50.0, 50.0, 1e-6])
    with pytest.raises(UserError, match="the points of photo 2 fit no focal length"):
        scene_of_pair(images, predictions)
    assert scene_of_pair(images, predictions, focal_limits=LIMITS).cameras.K[1, 0, 0] > 20
