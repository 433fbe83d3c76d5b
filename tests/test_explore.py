"""Clip after clip from one photo, with a geometry that knows the answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fvgen.explore import explore, joined, kept_frames
from fvgen.geometry import viewcrafter_paths as vc
from fvgen.geometry.trajectory import centre_depth, next_view_targets, parse_trajectory, target_cameras
from fvgen.models.bundle import ModelBundle
from fvgen.pipeline import FVGenPipeline, prepare
from fvgen.recipes.presets import get_preset
from fvgen.types import Cameras, ImageSet, Scene
from fvgen.utils.errors import UserError

SIZE, FRAMES = (40, 64), 8


class Plane:
    """In the place of an estimator: a plane at depth 2; photo k stands where the paths so far have led.

    Args:
        paths: followed one after the other.
        origin: where each begins.
    """

    fewest = 1

    def __init__(self, paths: list[str], origin: str = "latest") -> None:
        self.seen: list[ImageSet] = []
        self._paths, self._origin = paths, origin
        self._poses = torch.eye(4)[None]

    def __call__(self, images, cameras=None, *, progress=None) -> Scene:
        if self.seen:
            path = parse_trajectory(self._paths[len(self.seen) - 1])
            start = len(self.seen[-1]) - 1 if self._origin == "latest" else 0
            led = target_cameras(self.scene, replace(path, numbers={**path.numbers, "photo": start}), FRAMES)
            self._poses = torch.cat([self._poses, led.world_from_cam[kept_frames(FRAMES)]])
        self.seen.append(images)
        self.scene = plane(images, self._poses)
        return self.scene


def plane(images: ImageSet, poses: torch.Tensor) -> Scene:
    """Every photo sees the plane z = 2 of its own camera."""
    count, (height, width) = len(images), images.size
    K = torch.tensor([[60.0, 0, width / 2], [0, 60.0, height / 2], [0, 0, 1]]).expand(count, 3, 3)
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    local = 2 * torch.stack([(u - width / 2) / 60, (v - height / 2) / 60, torch.ones_like(u)], -1)
    points = torch.einsum("nij,hwj->nhwi", poses[:, :3, :3], local) + poses[:, None, None, :3, 3]
    return Scene(images, Cameras(K.contiguous(), poses, images.size), points, torch.ones(count, height, width))


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    tiny = get_preset("tiny")
    unet = {**tiny.unet, "model_channels": 32, "channel_mult": (1, 1), "attention_resolutions": (1, 2)}
    vae = {**tiny.vae, "block_out_channels": (16, 16, 16)}
    return ModelBundle.random(replace(tiny, index=replace(tiny.index, height=SIZE[0], width=SIZE[1]), unet=unet, vae=vae))


PHOTO = torch.rand(1, 3, 100, 160, generator=torch.Generator().manual_seed(0))
PATHS = ["orbit:deg=6", "orbit:deg=4", "orbit:deg=4"]


@pytest.mark.parametrize("kind", [str, Path])
def test_the_name_of_a_file_is_one_photo(bundle: ModelBundle, tmp_path: Path, kind: type) -> None:
    geometry, file = Plane(PATHS[:1]), tmp_path / "one.png"
    Image.fromarray((PHOTO[0].permute(1, 2, 0) * 255).byte().numpy()).save(file)
    pipe = FVGenPipeline(bundle, estimator=geometry)
    explore(pipe, kind(file), PATHS[:1], num_frames=FRAMES, steps=1)
    assert geometry.seen[0].names == (str(file),)
    assert prepare(kind(file), None, "orbit:deg=6", FRAMES, estimator=Plane([])).scene.images.names == (str(file),)
    assert pipe.clip_size(kind(file)) == SIZE


def test_frames_that_become_photos() -> None:
    assert kept_frames(25) == [6, 12, 18, 24]
    assert kept_frames(16) == [5, 10, 15]
    assert kept_frames(8) == [4, 7]
    assert kept_frames(2) == [1]


def test_each_clip_goes_on_where_the_last_one_ended(bundle: ModelBundle) -> None:
    geometry = Plane(PATHS)
    results = explore(FVGenPipeline(bundle, estimator=geometry), PHOTO, PATHS, num_frames=FRAMES, steps=1, seed=3)
    assert [len(images) for images in geometry.seen] == [1, 3, 5]
    for before, after, images in zip(results, results[1:], geometry.seen[1:], strict=False):
        last = before.video.rgb[-1]
        assert torch.equal(images.rgb[-1], last)
        assert torch.equal(after.renders.rgb[0], last)  # the frame takes the place of its render, as a photo does
        torch.testing.assert_close(after.cameras.world_from_cam[0], before.cameras.world_from_cam[-1], rtol=0.0, atol=1e-5)
    turned = results[-1].cameras.world_from_cam[-1, :3, 2] @ torch.tensor([0.0, 0.0, 1.0])
    assert float(torch.rad2deg(turned.acos())) == pytest.approx(14, abs=0.05)
    video = joined(results)
    assert video.video.rgb.shape == (3 * FRAMES - 2, 3, *SIZE)
    assert len(video.cameras) == len(video.renders.depth) == 3 * FRAMES - 2
    assert video.prepared.segments == (range(0, 8), range(7, 15), range(14, 22))
    assert torch.equal(video.video.rgb[FRAMES - 1], results[1].prepared.photos[-1])
    again = explore(FVGenPipeline(bundle, estimator=Plane(PATHS)), PHOTO, PATHS, num_frames=FRAMES, steps=1, seed=3)
    assert torch.equal(joined(again).video.rgb, video.video.rgb)


def test_each_clip_starts_at_the_photo(bundle: ModelBundle) -> None:
    geometry = Plane(PATHS, "photo")
    pipeline = FVGenPipeline(bundle, estimator=geometry)
    results = explore(pipeline, PHOTO, PATHS, origin="photo", num_frames=FRAMES, steps=1)
    for result in results:
        torch.testing.assert_close(result.cameras.world_from_cam[0], torch.eye(4))
        assert torch.equal(result.renders.rgb[0], geometry.seen[0].rgb[0])
    assert joined(results, "photo").video.rgb.shape[0] == 3 * FRAMES


def test_the_tilt_follows_the_camera(bundle: ModelBundle) -> None:
    """After a turn by theta the axis of the next turn is tilted by as much less against the photo: it stays where it was."""
    paths = ["target:theta=4,phi=3", "target:phi=5", "target:phi=5"]

    class Still(Plane):
        def __call__(self, images, cameras=None, *, progress=None) -> Scene:
            self.seen.append(images)
            return plane(images, torch.eye(4).expand(len(images), 4, 4))

    for origin, expected in (("latest", [5.0, 1.0, 1.0]), ("photo", [5.0, 5.0, 5.0])):
        pipeline = FVGenPipeline(bundle, estimator=Still(paths))
        results = explore(pipeline, PHOTO, paths, origin=origin, num_frames=FRAMES, steps=1)
        assert [r.prepared.trajectory.numbers["elevation"] for r in results] == expected


def test_candidates_are_those_of_viewcrafter() -> None:
    scene = plane(ImageSet(torch.rand(1, 3, *SIZE)), torch.eye(4)[None])
    targets = next_view_targets(parse_trajectory("nbv:phi=20,theta=8"))
    ends = torch.cat([target_cameras(scene, t, 2).world_from_cam[-1:] for t in targets]).double()
    anchor = torch.eye(4, dtype=torch.float64)
    in_object, _ = vc.in_object_frame(anchor[None], anchor.new_zeros(1, 3), 0, centre_depth(scene, 0))
    expected = torch.linalg.inv(in_object[0]) @ vc.candidate_poses(in_object, 3, 8.0, 20.0)
    torch.testing.assert_close(ends, expected, rtol=0.0, atol=1e-5)


class Wall:
    """In the place of an estimator: a wall that is larger than the photo sees, without its upper (-1) or lower (1) end."""

    fewest = 1

    def __init__(self, end: int) -> None:
        self._end = end

    def __call__(self, images, cameras=None, *, progress=None) -> Scene:
        scene = plane(images, torch.eye(4)[None])
        points = 3 * scene.points - torch.tensor([0.0, 0.0, 4.0])
        return replace(scene, points=points, confidence=(self._end * points[..., 1] < 0.5).float())


def test_the_least_known_view_is_chosen() -> None:
    """Turning shows more of one end of the wall and less of the other."""
    path = parse_trajectory("nbv:phi=2,theta=16")
    targets, images = next_view_targets(path), ImageSet(torch.rand(1, 3, *SIZE))
    chosen = {}
    for end in (-1, 1):
        followed, *clips = (prepare(images, None, each, 3, SIZE, estimator=Wall(end), radius=0.12) for each in (path, *targets))
        covers = [float(clip.renders.coverage[-1].float().mean()) for clip in clips]
        assert len(set(covers)) == 3
        assert followed.trajectory == targets[covers.index(min(covers))]
        chosen[end] = followed.trajectory.numbers["theta"]
    assert chosen[-1] * chosen[1] < 0


def test_bad_requests_are_refused(bundle: ModelBundle) -> None:
    pipeline = FVGenPipeline(bundle, estimator=Plane(PATHS))
    with pytest.raises(UserError, match="latest or photo"):
        explore(pipeline, PHOTO, PATHS, origin="somewhere")
    with pytest.raises(UserError, match="makes do with one"):
        explore(FVGenPipeline(bundle), PHOTO, PATHS)
    with pytest.raises(UserError, match="the path smooth does not start"):
        explore(pipeline, PHOTO, ["smooth"])
    with pytest.raises(UserError, match="the path none"):
        explore(pipeline, PHOTO, [])
    with pytest.raises(UserError, match="takes one photo, not 2"):
        explore(pipeline, torch.rand(2, 3, 40, 64), PATHS)
