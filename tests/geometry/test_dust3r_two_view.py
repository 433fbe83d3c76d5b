"""Two views in closed form on made-up scenes with known cameras, and through a network."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fvgen.geometry.conventions import invert_rigid, rigid
from fvgen.geometry.dust3r.pairs import PairPrediction
from fvgen.geometry.dust3r.pinhole import camera_pose, estimate_focal, intrinsics, transform, unproject
from fvgen.geometry.dust3r.two_view import scene_of_pair, two_view_scene
from fvgen.geometry.se3 import so3_exp
from fvgen.models.dust3r import Dust3rNetwork
from fvgen.types import ImageSet
from fvgen.utils.errors import UserError

SIZE = (48, 64)
FOCALS = (55.0, 70.0)


def _pose() -> torch.Tensor:
    """World_from_cam of photo 1, photo 0 being the world."""
    turn = so3_exp(torch.tensor([0.1, -0.2, 0.05], dtype=torch.float64))
    return rigid(turn, torch.tensor([0.5, -0.1, 0.2], dtype=torch.float64))


def _predictions(scale: float = 2.0) -> list[PairPrediction]:
    """Exact point maps of two photos; the pair (1, 0) has a unit of its own. The pair (0, 1) is trusted more."""
    generator = torch.Generator().manual_seed(0)
    points = []
    for focal, pose in zip(FOCALS, (torch.eye(4, dtype=torch.float64), _pose()), strict=True):
        depth = 3 + torch.rand(SIZE, generator=generator, dtype=torch.float64)
        points.append(unproject(depth, intrinsics(focal, SIZE), pose))
    back = invert_rigid(_pose())
    sure = torch.full(SIZE, 9.0)
    return [
        PairPrediction(0, 1, points[0], sure, points[1], sure),
        PairPrediction(1, 0, scale * transform(back, points[1]), sure - 1, scale * transform(back, points[0]), sure),
    ]


def test_exact_point_maps_give_the_cameras_back() -> None:
    predictions = _predictions()
    scene = scene_of_pair(ImageSet(torch.zeros(2, 3, *SIZE)), predictions)
    torch.testing.assert_close(scene.cameras.K[:, 0, 0], torch.tensor(FOCALS), rtol=1e-6, atol=0.0)
    expected = torch.stack([torch.eye(4), _pose().float()])
    torch.testing.assert_close(scene.cameras.world_from_cam, expected, rtol=0.0, atol=1e-5)
    torch.testing.assert_close(scene.points[0], predictions[0].points_first.float(), rtol=0.0, atol=1e-4)
    torch.testing.assert_close(scene.points[1], predictions[0].points_second.float(), rtol=0.0, atol=1e-4)


def test_the_pair_with_the_higher_score_is_the_world() -> None:
    first, second = _predictions(scale=2.0)
    second = replace(second, confidence_first=2 * second.confidence_first)
    scene = scene_of_pair(ImageSet(torch.zeros(2, 3, *SIZE)), [first, second])
    expected = invert_rigid(_pose())
    expected[:3, 3] *= 2.0
    torch.testing.assert_close(scene.cameras.world_from_cam[1], torch.eye(4))
    torch.testing.assert_close(scene.cameras.world_from_cam[0], expected.float(), rtol=0.0, atol=1e-5)


def test_pixels_of_low_confidence_take_no_part() -> None:
    first, second = _predictions()
    first.confidence_second[:10], second.confidence_first[:10] = 2.5, 2.9
    first.points_second[:10] = 100.0
    scene = scene_of_pair(ImageSet(torch.zeros(2, 3, *SIZE)), [first, second])
    torch.testing.assert_close(scene.cameras.world_from_cam[1], _pose().float(), rtol=0.0, atol=1e-5)
    assert (scene.confidence[1, :10] == 0).all()
    assert (scene.confidence[1, 10:] == 9).all()


def test_unsure_pixels_take_no_part_in_the_pose_though_they_get_points() -> None:
    """60 % of the pixels are unsure and look as if nothing had moved: the others give the pose, and all get points."""
    predictions = _predictions()
    unsure = slice(0, round(0.6 * SIZE[0]))
    for p, q in (predictions, predictions[::-1]):
        p.points_second[unsure] = q.points_first[unsure]
        p.confidence_first[unsure] = p.confidence_second[unsure] = 1.5
    scene = scene_of_pair(ImageSet(torch.zeros(2, 3, *SIZE)), predictions, min_confidence=math.log(3))
    torch.testing.assert_close(scene.cameras.world_from_cam[1], _pose().float(), rtol=0.0, atol=1e-5)
    assert (scene.confidence[:, unsure] == 1.5).all()


def test_a_high_limit_for_points_leaves_the_pose() -> None:
    scene = scene_of_pair(ImageSet(torch.zeros(2, 3, *SIZE)), _predictions(), min_confidence=9.5)
    torch.testing.assert_close(scene.cameras.world_from_cam[1], _pose().float(), rtol=0.0, atol=1e-5)
    assert (scene.confidence == 0).all()


def test_focal_length_ignores_outliers_and_zero_depths() -> None:
    points = _predictions()[0].points_first.clone()
    points[5:9, 5:9] += torch.tensor([1.0, -2.0, 0.5])
    points[20, 20] = torch.tensor([1.0, 1.0, 0.0])
    points[21, 20] = 0.0
    assert estimate_focal(points) == pytest.approx(FOCALS[0], rel=2e-3)


def test_focal_length_of_a_field_of_view() -> None:
    points = _predictions()[0].points_first
    unit = 64 / (2 * math.tan(math.pi / 6))
    assert estimate_focal(points, limits=(0.5, 0.8)) == pytest.approx(0.8 * unit)
    assert estimate_focal(points, limits=(1.5, 2.0)) == pytest.approx(1.5 * unit)


def test_no_pose_without_points() -> None:
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[0, :3] = True
    assert camera_pose(_predictions()[0].points_first, intrinsics(55.0, SIZE), mask) is None
    doubted = [
        replace(p, confidence_first=p.confidence_first / 9, confidence_second=p.confidence_second / 9) for p in _predictions()
    ]
    with pytest.raises(UserError, match="no relative pose"):
        scene_of_pair(ImageSet(torch.zeros(2, 3, *SIZE)), doubted)


def test_photos_through_a_network(monkeypatch) -> None:
    """Sizes, order and units of everything between the photos and the scene, with a network that knows the answer."""
    small = {"encoder_width": 16, "encoder_layers": 1, "encoder_heads": 2, "decoder_width": 8, "decoder_layers": 4}
    small |= {"decoder_heads": 1, "layer_widths": (4, 4, 4, 4), "feature_width": 8, "last_width": 4}
    network, predictions = Dust3rNetwork(**small).eval(), _predictions()
    from fvgen.models.dust3r import PointMap

    def decode(first, second):
        answer = predictions[0] if float(first.tokens.mean()) == photos[0] else predictions[1]
        parts = (answer.points_first, answer.confidence_first), (answer.points_second, answer.confidence_second)
        return tuple(PointMap(p[None].float(), c[None]) for p, c in parts)

    photos = [0.0, 1.0]
    encoded = iter(photos)
    monkeypatch.setattr(network, "encode", lambda image: _Tokens(torch.full((1,), next(encoded)), image.shape))
    monkeypatch.setattr(network, "decode", decode)
    images = ImageSet(torch.rand(2, 3, 2 * SIZE[0], 2 * SIZE[1]), ("a", "b"), (100.0, None))
    scene = two_view_scene(network, images, size=64)
    assert scene.images.size == SIZE
    assert scene.images.names == ("a", "b")
    assert scene.images.focal_px == (50.0, None)
    torch.testing.assert_close(scene.cameras.K[:, 0, 0], torch.tensor(FOCALS), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(scene.cameras.world_from_cam[1], _pose().float(), rtol=0.0, atol=1e-5)


class _Tokens:
    def __init__(self, tokens: torch.Tensor, shape: torch.Size) -> None:
        assert shape == (1, 3, *SIZE)
        self.tokens = tokens


def test_two_photos_are_needed() -> None:
    with pytest.raises(UserError, match="two photos are needed, 3 were given"):
        two_view_scene(None, ImageSet(torch.zeros(3, 3, *SIZE)))
