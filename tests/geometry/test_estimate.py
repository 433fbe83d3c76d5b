from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fvgen.geometry import estimate_scene
from fvgen.types import ImageSet, Scene
from fvgen.utils.errors import UserError
from tests.geometry.synthetic import SIZE, capture, pose, rays

MOTIONS = {
    "sideways": pose((0.5, 0, 0)),
    "to the left, converging": pose((-0.7, 0.1, 0), (0, 7, 0)),
    "upwards": pose((0.05, 0.5, 0)),
    "diagonal with roll": pose((0.4, 0.4, 0.1), (3, -4, 20)),
    "half forward": pose((0.45, 0, 0.45)),
}


def depth(scene: Scene) -> torch.Tensor:
    centre, axis = scene.cameras.world_from_cam[:, :3, 3], scene.cameras.world_from_cam[:, :3, 2]
    return ((scene.points - centre[:, None, None]) * axis[:, None, None]).sum(-1)


def assert_accurate(scene: Scene, truth: torch.Tensor, coverage: float, median: float, outliers: float) -> None:
    """Median relative error below ``median`` and a share below ``outliers`` off by more than 3 percent."""
    for view in range(len(scene.images)):
        known = scene.confidence[view] > 0
        error = (depth(scene)[view] / truth[view] - 1).abs()[known]
        assert known.float().mean() > coverage
        assert error.median() < median
        assert (error > 0.03).float().mean() < outliers


@pytest.mark.parametrize("name", MOTIONS)
def test_stereo_finds_the_depth_of_two_planes(name: str) -> None:
    images, cameras, truth = capture([pose((0, 0, 0)), MOTIONS[name]])
    scene = estimate_scene(images, cameras)
    assert_accurate(scene, truth, coverage=0.5, median=0.003, outliers=0.03)
    assert torch.equal(scene.images.rgb, images.rgb)
    assert (scene.confidence <= 1).all()
    assert scene.quality.coverage == pytest.approx(tuple((scene.confidence > 0).float().mean((1, 2)).tolist()))


def test_points_lie_on_the_rays_of_their_pixels() -> None:
    images, cameras, _ = capture([pose((0, 0, 0)), pose((0.4, 0.1, 0), (2, -3, 5))])
    scene = estimate_scene(images, cameras)
    for view in range(2):
        known = scene.confidence[view] > 0
        cam_from_world = torch.linalg.inv(scene.cameras.world_from_cam[view])
        local = scene.points[view][known] @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]
        want = torch.from_numpy(rays(scene.cameras.K[view].numpy(), SIZE)).float()[known]
        torch.testing.assert_close(local[:, :2] / local[:, 2:], want[:, :2], rtol=0, atol=1e-4)


def test_moving_straight_ahead_uses_the_plane_sweep() -> None:
    images, cameras, truth = capture([pose((0, 0, 0)), pose((0.03, 0, 1.2))])
    assert_accurate(estimate_scene(images, cameras), truth, coverage=0.2, median=0.02, outliers=0.2)


def test_portrait_photos_and_a_smaller_working_size() -> None:
    images, cameras, truth = capture([pose((0, 0, 0)), pose((0.5, 0, 0))], size=(320, 200))
    scene = estimate_scene(images, cameras, long_side=160)
    assert scene.points.shape == (2, 160, 100, 3)
    torch.testing.assert_close(scene.cameras.K[:, :2], cameras.K[:, :2] / 2)
    assert_accurate(scene, truth[:, ::2, ::2], coverage=0.4, median=0.01, outliers=0.1)


def test_three_photos_are_fused() -> None:
    images, cameras, truth = capture([pose((x, 0, 0)) for x in (-0.5, 0.0, 0.5)])
    scene = estimate_scene(images, cameras)
    assert_accurate(scene, truth, coverage=0.5, median=0.003, outliers=0.03)
    pair = estimate_scene(ImageSet(images.rgb[:2], images.names[:2], (None, None)), cameras[:2])
    assert scene.quality.coverage[1] > pair.quality.coverage[1]


def test_filling_adds_only_doubtful_points() -> None:
    images, cameras, _ = capture([pose((0, 0, 0)), pose((0.5, 0, 0))])
    plain, filled = estimate_scene(images, cameras), estimate_scene(images, cameras, fill=True)
    known = plain.confidence > 0
    assert torch.equal(filled.confidence[known], plain.confidence[known])
    added = (filled.confidence > 0) & ~known
    assert added.float().mean() > 0.02
    assert filled.confidence[added].max() <= 0.1
    assert torch.isfinite(filled.points).all()


@pytest.mark.parametrize("second", [pose((0.6, 0, 0), (0, -6, 0)), pose((0.1, 0.6, 0.1), (5, 0, 3))])
def test_cameras_from_two_photos(second: np.ndarray) -> None:
    images, cameras, truth = capture([pose((0.2, 0.1, 0)), second])
    images = replace(images, focal_px=(300.0, 300.0))
    scene = estimate_scene(images)
    first, found = cameras.world_from_cam.double(), scene.cameras.world_from_cam.double()
    relative = torch.linalg.inv(first[0]) @ first[1]
    turn = relative[:3, :3].T @ found[1, :3, :3]
    assert torch.rad2deg(torch.arccos(((turn.trace() - 1) / 2).clamp(-1, 1))) < 0.5
    cosine = torch.nn.functional.cosine_similarity(relative[:3, 3], found[1, :3, 3], dim=0)
    assert torch.rad2deg(torch.arccos(cosine.clamp(-1, 1))) < 2.0
    torch.testing.assert_close(found[0], torch.eye(4, dtype=torch.float64))
    assert scene.cameras.K[0, 0, 0].item() == pytest.approx(300, rel=0.05)
    # Unit: median depth of the tracks is 1, so the depths differ from the truth by one factor.
    factor = (truth[0] / depth(scene)[0])[scene.confidence[0] > 0].median()
    assert 3.9 < factor < 6.1
    assert scene.quality.reprojection_error_px is not None
    assert scene.quality.reprojection_error_px < 0.5
    assert scene.quality.shared_tracks is not None
    assert scene.quality.shared_tracks > 100
    assert not scene.quality.warnings


def test_same_photos_give_the_same_scene() -> None:
    images, _, _ = capture([pose((0, 0, 0)), pose((0.5, 0, 0))])
    a, b = estimate_scene(images), estimate_scene(images)
    assert torch.equal(a.cameras.world_from_cam, b.cameras.world_from_cam)
    assert torch.equal(a.points, b.points)


@pytest.mark.slow
def test_cameras_from_four_photos() -> None:
    poses = [pose((x, 0.1 * x * x, 0), (0, -5 * x, 0)) for x in (-0.9, -0.3, 0.3, 0.9)]
    images, cameras, _ = capture(poses, size=(360, 480))
    scene = estimate_scene(images)
    truth = torch.linalg.inv(cameras.world_from_cam[0]) @ cameras.world_from_cam
    found = scene.cameras.world_from_cam
    scale = truth[-1, :3, 3].norm() / found[-1, :3, 3].norm()
    torch.testing.assert_close(found[:, :3, 3] * scale, truth[:, :3, 3], atol=0.05, rtol=0)
    again = estimate_scene(images)
    assert torch.equal(again.cameras.world_from_cam, found)


def test_refusals_are_one_clear_sentence() -> None:
    images, cameras, _ = capture([pose((0, 0, 0)), pose((0.5, 0, 0))])
    other, _, _ = capture([pose((0, 0, 0))], seed=50)
    strangers = replace(images, rgb=torch.cat([images.rgb[:1], other.rgb]))
    blank = replace(images, rgb=torch.full_like(images.rgb, 0.5))
    twice = replace(images, rgb=images.rgb[[0, 0]])
    one = ImageSet(images.rgb[:1], images.names[:1], (None,))
    still = replace(cameras, world_from_cam=cameras.world_from_cam[[0, 0]])
    turned, turned_cameras, _ = capture([pose((0, 0, 0)), pose((0, 0, 0), (0, 8, 0))])
    cases = [
        ((strangers, None), {}, "share only"),
        ((strangers, cameras), {}, "share only"),
        ((blank, None), {}, "share only"),
        ((twice, None), {}, "same place"),
        ((twice, cameras), {}, "share only|same place"),
        ((images, still), {}, "same place"),
        ((turned, None), {}, "same place"),
        ((turned, turned_cameras), {}, "same place"),
        ((one, None), {}, "at least two"),
        ((images, cameras[:1]), {}, "do not fit"),
        ((images, replace(cameras, image_size=(9, 9))), {}, "do not fit"),
        ((images, cameras), {"method": "magic"}, "known methods: stereo"),
    ]
    for arguments, options, word in cases:
        with pytest.raises(UserError, match=word) as caught:
            estimate_scene(*arguments, **options)
        assert "\n" not in str(caught.value)


def test_progress_rises_to_one() -> None:
    images, cameras, _ = capture([pose((0, 0, 0)), pose((0.5, 0, 0))])
    seen: list[float] = []
    estimate_scene(images, cameras, progress=lambda _what, fraction: seen.append(fraction))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_a_wide_pair_with_few_tracks_is_warned_about() -> None:
    images, cameras, _ = capture([pose((0, 0, 0)), pose((0.5, 0, 0))])
    assert estimate_scene(images, cameras).quality.warnings == ()
    hidden = images.rgb.clone()
    hidden[:, :, :, : int(0.86 * SIZE[1])] = 0.5
    scene = estimate_scene(replace(images, rgb=hidden), cameras)
    assert any("share only" in w for w in scene.quality.warnings)
