"""Photos of several sizes and orientations: the alignment in its frame, scenes, and clips that have the frame of the first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fvgen.geometry.conventions import invert_rigid
from fvgen.geometry.dust3r.alignment import AlignmentState, Objective, optimise, pair_scales, pose_code, pose_matrix
from fvgen.geometry.dust3r.estimate import dust3r_scene
from fvgen.geometry.dust3r.pairs import PairPrediction
from fvgen.geometry.dust3r.pinhole import intrinsics, transform, unproject
from fvgen.geometry.estimate import estimate_scene
from fvgen.geometry.mixed import in_first_frame
from fvgen.geometry.resize import scale_cameras
from fvgen.pipeline import prepare
from fvgen.types import Cameras, ImageSet, Scene
from fvgen.utils.errors import UserError
from tests.geometry.synthetic import pose
from tests.reference_dust3r import KnowingNetwork

# landscape, portrait, panorama: the photos, what they are scaled to, what the network sees, and (top, left) of that
PHOTOS = [(108, 128), (160, 110), (64, 96)]
WHOLE = [(54, 64), (64, 44), (43, 64)]
SEEN = [(48, 64), (64, 32), (32, 64)]
CUT = [(3, 0), (0, 6), (5, 0)]
FRAME = (64, 64)
FOCALS = [60.0, 75.0, 50.0]


def _photo(height: int, width: int) -> ImageSet:
    """Colours say where a pixel is: red from left to right, green from top to bottom."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return ImageSet(torch.stack([x, y, torch.zeros_like(x)])[None], (f"{height}x{width}",), (None,))


def _world(count: int) -> tuple[list[Cameras], list[torch.Tensor]]:
    """Cameras and depth of what the network sees."""
    generator = torch.Generator().manual_seed(0)
    cameras = []
    for n in range(count):
        place = torch.from_numpy(pose((0.4 * n + 1, 0.1 * n, 0.2), (2.0 * n, 5.0 - 4.0 * n, 0.0))).float()
        cameras.append(Cameras(intrinsics(FOCALS[n], SEEN[n]).float()[None], place[None], SEEN[n]))
    # a plane: so nothing lies in front of what another photo sees
    return cameras, [3 + 0.01 * torch.rand(SEEN[n], generator=generator, dtype=torch.float64) for n in range(count)]


def _scene(count: int) -> tuple[ImageSet, Scene, list[Cameras], list[torch.Tensor]]:
    cameras, depth = _world(count)
    images = in_first_frame([_photo(*size) for size in PHOTOS[:count]])
    network = KnowingNetwork(cameras, depth, max(FRAME))
    return images, dust3r_scene(network, images, steps=0), cameras, depth


def test_photos_in_the_frame_of_the_first() -> None:
    images = in_first_frame([replace(_photo(*size), focal_px=(100.0,)) for size in PHOTOS])
    assert images.rgb.shape == (3, 3, *PHOTOS[0])
    assert [tuple(rgb.shape[1:]) for rgb in images.whole] == PHOTOS
    # the portrait photo is scaled by 128 / 110 and loses rows at the top and the bottom alike
    assert images.focal_px == pytest.approx((100.0, 100 * 128 / 110, 100 * 108 / 64))
    middle = images.rgb[:, :2, 53:55, 63:65].mean((2, 3))
    torch.testing.assert_close(middle, torch.full((3, 2), 0.5), rtol=0.0, atol=1e-6)
    assert float(images.rgb[1, 1].min()) == pytest.approx(0.5 - 54 / 186, abs=0.01)
    assert in_first_frame([_photo(20, 30)] * 2).whole == ()


@pytest.mark.parametrize("count", [2, 3])
def test_cameras_and_points_of_whole_photos(count: int) -> None:
    _, scene, cameras, depth = _scene(count)
    assert scene.images.size == tuple(scene.confidence.shape[1:]) == scene.cameras.image_size == FRAME
    world = cameras[0].world_from_cam[0].double()
    factor = float(1 / depth[0].median())
    for n in range(count):
        top, left = (CUT[n][axis] + (FRAME[axis] - WHOLE[n][axis]) // 2 for axis in (0, 1))
        part = (slice(top, top + SEEN[n][0]), slice(left, left + SEEN[n][1]))
        expected = factor * transform(invert_rigid(world), unproject(depth[n], cameras[n].K[0], cameras[n].world_from_cam[0]))
        # everything is float32 and of the size of 1, but K of the size of 100
        torch.testing.assert_close(scene.points[n][part].double(), expected, rtol=0.0, atol=1e-5)
        assert (scene.confidence[n][part] > 0).all()
        assert int((scene.confidence[n] > 0).sum()) == SEEN[n][0] * SEEN[n][1]
        K = cameras[n].K[0].clone()
        K[:2, 2] += torch.tensor([left, top])
        torch.testing.assert_close(scene.cameras.K[n], K, rtol=0.0, atol=1e-4)
        found = invert_rigid(world) @ cameras[n].world_from_cam[0].double()
        found[:3, 3] *= factor
        torch.testing.assert_close(scene.cameras.world_from_cam[n].double(), found, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_points_fall_where_the_cut_photo_shows_them(count: int) -> None:
    """A point has the colour that the photo, cut to the frame of the first, has where its camera there sees the point."""
    images, scene, _, _ = _scene(count)
    assert scene.frames is not None
    assert scene.photo_cameras.image_size == WHOLE[0]
    shown = scale_cameras(scene.photo_cameras, images.size)
    for n in range(count):
        points, colours = scene.cloud(views=[n])
        seen = transform(torch.linalg.inv(shown.world_from_cam[n]), points) @ shown.K[n].T
        at = seen[:, :2] / seen[:, 2:]
        inside = ((at > 1) & (at < at.new_tensor([images.size[1] - 1, images.size[0] - 1]))).all(-1)
        assert inside.float().mean() > 0.4
        x, y = at[inside].long().unbind(-1)
        # a point lies up to half a pixel beside the one that is read, and the photos are ramps over 64 pixels and more
        torch.testing.assert_close(images.rgb[n][:, y, x].T, colours[inside], rtol=0.0, atol=0.5 / 64)


def test_the_loss_is_that_of_the_paper() -> None:
    """Both sums, over first and over second photos, are divided by their numbers of pixels, which differ here."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    predictions = []
    for i, j in ((0, 1), (1, 2), (0, 2)):
        maps = [(draw(*SEEN[n], 3), 1 + draw(*SEEN[n]).abs()) for n in (i, j)]
        predictions.append(PairPrediction(i, j, *maps[0], *maps[1]))
    state = AlignmentState(draw(3, 7), 20 * torch.tensor(FOCALS).double().log(), 0.1 * draw(3, *FRAME), draw(3, 8))
    scales, pairs, places = pair_scales(state.pair_poses), pose_matrix(state.pair_poses), pose_matrix(state.poses)
    sums, pixels = [0.0, 0.0], [0, 0]
    for edge, p in enumerate(predictions):
        sides = ((p.first, p.points_first, p.confidence_first), (p.second, p.points_second, p.confidence_second))
        for side, (n, points, confidence) in enumerate(sides):
            top, left = ((FRAME[axis] - SEEN[n][axis]) // 2 for axis in (0, 1))
            depth = state.depths[n, top : top + SEEN[n][0], left : left + SEEN[n][1]].exp()
            world = unproject(depth, intrinsics(FOCALS[n], SEEN[n]), places[n])
            moved = scales[edge] * transform(pairs[edge], points)
            sums[side] += float((confidence.log() * (world - moved).norm(dim=-1)).sum())
            pixels[side] += confidence.numel()
    assert pixels[0] != pixels[1]
    assert float(Objective(predictions)(state)) == pytest.approx(sums[0] / pixels[0] + sums[1] / pixels[1], rel=1e-9)


def test_pixels_around_a_photo_do_not_move() -> None:
    sure = [torch.full(size, 5.0) for size in SEEN[:2]]
    points = [torch.rand(*size, 3, generator=torch.Generator().manual_seed(0)) for size in SEEN[:2]]
    predictions = [PairPrediction(i, 1 - i, points[i], sure[i], points[1 - i], sure[1 - i]) for i in (0, 1)]
    code = pose_code(torch.eye(4).repeat(2, 1, 1))
    start = AlignmentState(
        code, 20 * torch.full((2,), 60.0).log(), torch.zeros(2, *FRAME), torch.cat([code, torch.zeros(2, 1)], dim=1)
    )
    state, losses = optimise(start, Objective(predictions), steps=5)
    assert losses[-1] < losses[0]
    assert (state.depths[0, :8] == 0).all()
    assert (state.depths[1, :, :16] == 0).all()
    assert (state.depths[0, 8:56] != 0).all()


class _Knowing:
    """In the place of an estimator."""

    fewest, mixed = 1, True

    def __call__(self, images, cameras=None, *, progress=None) -> Scene:
        count = len(images)
        return dust3r_scene(KnowingNetwork(*_world(count), max(FRAME)), images, cameras, steps=0)


def test_a_clip_has_the_frame_of_the_first_photo(tmp_path: Path) -> None:
    files = []
    for number, size in enumerate(PHOTOS):
        files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray((_photo(*size).rgb[0].permute(1, 2, 0) * 255).round().byte().numpy()).save(files[-1])
    prepared = prepare(files, None, "smooth", 3, [(54, 64), (64, 54)], estimator=_Knowing())
    assert prepared.renders.cameras.image_size == (54, 64)
    assert prepared.photo_frames == (0, 2, 4)
    assert torch.equal(prepared.renders.rgb[[0, 2, 4]], prepared.photos)
    assert float(prepared.renders.coverage[1].float().mean()) > 0.2  # single points, one pixel wide
    assert prepare(files[:2], None, "smooth", 3, estimator=_Knowing()).renders.cameras.image_size == WHOLE[0]
    given = Cameras(torch.eye(3).repeat(3, 1, 1), torch.eye(4).repeat(3, 1, 1), PHOTOS[0])
    with pytest.raises(UserError, match=r"differ in size: .*; bring all photos to one size and orientation"):
        prepare(files, given, "smooth", 3, estimator=_Knowing())
    with pytest.raises(UserError, match="differ in size"):
        prepare(files, None, "smooth", 3)


def test_what_needs_photos_of_one_size_says_so() -> None:
    images = in_first_frame([_photo(*size) for size in PHOTOS])
    given = Cameras(torch.eye(3).repeat(3, 1, 1), torch.eye(4).repeat(3, 1, 1), PHOTOS[0])
    with pytest.raises(UserError, match="given cameras need photos of one size"):
        dust3r_scene(KnowingNetwork(*_world(3), max(FRAME)), images, given)
    with pytest.raises(UserError, match="differ in size; bring all photos"):
        estimate_scene(images)
