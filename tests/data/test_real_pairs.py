"""Pairs of captures whose cameras and depth are known in closed form."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fvgen.data.clips import Clip, Rejected
from fvgen.data.layouts import Capture, find_captures, read_capture
from fvgen.data.pairs import Limits, Pair, build_pair
from fvgen.data.synthetic.depth import backproject
from fvgen.geometry.resize import fit
from fvgen.types import Cameras, GeometryQuality, ImageSet, Scene
from fvgen.utils.errors import UserError
from tests.data.scenes import SIZE, truth, write_images, write_transforms_scene

CLIP, FRAMES = Clip(".", 0, 1, 2), 4  # frames 1, 3, 5, 7


def read(folder: Path) -> Capture:
    return read_capture(find_captures(folder)[0], SIZE)


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    return read(write_transforms_scene(tmp_path_factory.mktemp("capture")))


@pytest.fixture(scope="module")
def pair(capture: Capture) -> Pair:
    return build_pair(capture, CLIP, FRAMES, SIZE)


def psnr(a: Tensor, b: Tensor, where: Tensor) -> float:
    return float(-10 * torch.log10((a - b).square().mean(1)[where].mean()))


def test_pair(pair: Pair) -> None:
    made = truth()
    assert pair.truth.shape == (FRAMES, 3, *SIZE)
    assert (pair.truth - made.rgb[[1, 3, 5, 7]]).abs().max() < 0.6 / 255
    for t in (0, -1):
        assert torch.equal(pair.renders.rgb[t], pair.truth[t])
    torch.testing.assert_close(
        pair.renders.cameras.world_from_cam, made.cameras.world_from_cam[[1, 3, 5, 7]], atol=1e-5, rtol=1e-5
    )
    inner = slice(1, -1)
    assert (pair.renders.rgb[inner].amax(1)[~pair.renders.coverage[inner]] == 0).all()
    assert pair.facts["geometry"].startswith("depth")


def test_true_depth_puts_the_points_where_the_photos_show_them(pair: Pair) -> None:
    """A shift by one pixel in any direction costs more than 2 dB."""
    shots = slice(1, -1)
    render, photo, covered = pair.renders.rgb[shots], pair.truth[shots], pair.renders.coverage[shots].clone()
    covered[:, [0, -1]] = covered[:, :, [0, -1]] = False
    score = psnr(render, photo, covered)
    assert score > 27
    for shift in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        assert psnr(render, photo.roll(shift, (-2, -1)), covered) < score - 2


def test_facts_by_other_means(pair: Pair) -> None:
    covered = pair.renders.coverage[1:-1].numpy()
    squares = (pair.renders.rgb - pair.truth)[1:-1].double().numpy() ** 2
    assert pair.facts["coverage"] == pytest.approx(covered.mean(), abs=1e-4)
    assert pair.facts["psnr_covered"] == pytest.approx(-10 * np.log10(squares.mean(1)[covered].mean()), abs=1e-3)
    # angle at the points of the first and last photo, by the law of cosines
    made, angles = truth(), []
    centres = made.cameras.world_from_cam[[1, 7], :3, 3].double().numpy()
    for i in (1, 7):
        v, u = np.mgrid[0 : SIZE[0], 0 : SIZE[1]] + 0.5
        rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(made.cameras.K[i].double().numpy()).T
        pose = made.cameras.world_from_cam[i].double().numpy()
        points = (rays * made.depth[i].double().numpy()[..., None]) @ pose[:3, :3].T + pose[:3, 3]
        a, b = (np.linalg.norm(points - c, axis=-1) for c in centres)
        angles.append(np.arccos((a**2 + b**2 - ((centres[0] - centres[1]) ** 2).sum()) / (2 * a * b)))
    assert pair.facts["angle_deg"] == pytest.approx(np.degrees(np.median(angles)), abs=0.01)


def test_intrinsics_follow_the_cut(capture: Capture) -> None:
    """An upright cut of the photos: the render still agrees with them."""
    size = (96, 60)
    pair = build_pair(capture, CLIP, FRAMES, size, limits=Limits(min_coverage=0.05))
    wanted = fit(ImageSet(truth().rgb[[1, 3, 5, 7]]), None, size)[0].rgb
    assert (pair.truth - wanted).abs().max() < 0.6 / 255
    assert pair.renders.cameras.K[0, 0, 2] == pytest.approx(30, abs=1e-4)
    assert pair.facts["psnr_covered"] > 26


def test_stereo_agrees_with_the_photos(capture: Capture) -> None:
    pair = build_pair(capture, CLIP, FRAMES, SIZE, geometry="stereo")
    assert pair.facts["geometry"] == "stereo, given cameras"
    assert pair.facts["psnr_covered"] > 24
    assert pair.facts["coverage"] > 0.3


class Knowing:
    """In DUSt3R's place: it knows the true depth of the two end frames, or fails."""

    fewest, mixed = 1, True

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.asked = fails, 0

    def __call__(self, images: ImageSet, cameras: Cameras | None = None, *, progress: object = None) -> Scene:
        self.asked += 1
        if self.fails:
            raise UserError("no points")
        made = truth()
        ends = made.cameras[[1, 7]]
        assert cameras is not None
        # poses are float32 and turned between two conventions; colours are off by half a step of 8 bits, and their own rounding
        torch.testing.assert_close(cameras.world_from_cam, ends.world_from_cam, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(images.rgb, made.rgb[[1, 7]], atol=0.6 / 255, rtol=0)
        points = backproject(made.depth[[1, 7]].double(), ends.K.double(), ends.world_from_cam.double()).float()
        quality = GeometryQuality("dust3r, given cameras")
        return Scene(images, cameras, points, torch.ones(points.shape[:3]), quality)


@pytest.mark.parametrize(("geometry", "with_depth", "asked"), [("dust3r", True, 1), ("auto", False, 1), ("auto", True, 0)])
def test_points_of_dust3r(capture: Capture, geometry: str, with_depth: bool, asked: int) -> None:
    """Asked for the two end frames with their cameras; files with depth come first, unless it is named."""
    used = capture if with_depth else replace(capture, frames=tuple(replace(f, depth=None) for f in capture.frames))
    estimator = Knowing()
    pair = build_pair(used, CLIP, FRAMES, SIZE, geometry=geometry, estimator=estimator)
    assert estimator.asked == asked
    assert pair.facts["geometry"].startswith("dust3r" if asked else "depth")
    assert pair.facts["psnr_covered"] > 26


def test_dust3r_without_points(capture: Capture) -> None:
    with pytest.raises(Rejected, match="geometry failed: no points"):
        build_pair(capture, CLIP, FRAMES, SIZE, geometry="dust3r", estimator=Knowing(fails=True))


Break = Callable[[Capture, Path], Capture]


def _with(capture: Capture, at: int, **changes: object) -> Capture:
    frames = list(capture.frames)
    frames[at] = replace(frames[at], **changes)
    return replace(capture, frames=tuple(frames))


def _moved(capture: Capture, at: int, centre: tuple[float, float, float]) -> Capture:
    pose = capture.frames[at].camera.world_from_cam.copy()
    pose[:3, 3] = centre
    return _with(capture, at, camera=replace(capture.frames[at].camera, world_from_cam=pose))


def _text_as_image(capture: Capture, folder: Path) -> Capture:
    (folder / "x.png").write_text("no image")
    return _with(capture, 3, image=folder / "x.png")


def _other_size(capture: Capture, folder: Path) -> Capture:
    write_images(folder, truth().rgb[:1, :, :50], ["x.png"])
    return _with(capture, 3, image=folder / "x.png")


def _still(capture: Capture, _folder: Path) -> Capture:
    for i in range(1, 8):
        capture = _moved(capture, i, (0.1, 0.2, 0.3))
    return capture


def _nearly_still(capture: Capture, _folder: Path) -> Capture:
    for i in range(1, 8):
        capture = _moved(capture, i, (0.001 * i, 0, 0))
    return capture


def _nan(capture: Capture, _folder: Path) -> Capture:
    return _moved(capture, 5, (0, np.nan, 0))


def _empty_depth(capture: Capture, folder: Path) -> Capture:
    np.save(folder / "x.npy", np.full(SIZE, np.nan))
    return _with(capture, 1, depth=folder / "x.npy")


def _small_depth(capture: Capture, folder: Path) -> Capture:
    np.save(folder / "x.npy", np.ones((4, 5)))
    return _with(capture, 1, depth=folder / "x.npy")


def _wrong_depth(capture: Capture, folder: Path) -> Capture:
    np.save(folder / "x.npy", np.full(SIZE, 0.9))
    return _with(_with(capture, 1, depth=folder / "x.npy"), 7, depth=folder / "x.npy")


def _noise(capture: Capture, folder: Path) -> Capture:
    write_images(folder, torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)), ["a.png", "b.png"])
    return _with(_with(capture, 1, image=folder / "a.png", depth=None), 7, image=folder / "b.png", depth=None)


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("unreadable image", _text_as_image),
        ("unreadable image", _other_size),
        ("unreadable image", lambda c, folder: _with(c, 5, image=folder / "none.png")),
        ("bad camera", _nan),
        ("camera jumps", lambda c, _: _moved(c, 7, (30, 0, 0))),
        ("no parallax", _still),
        ("no parallax", _nearly_still),
        ("unreadable depth", lambda c, folder: _with(c, 1, depth=folder / "none.npy")),
        ("unreadable depth", _small_depth),
        ("no depth", _empty_depth),
        ("renders unlike the photos", _wrong_depth),
        ("geometry failed", _noise),
    ],
)
def test_rejections(capture: Capture, tmp_path: Path, reason: str, spoil: Break) -> None:
    limits = Limits(min_coverage=0.05, min_psnr=20)
    with pytest.raises(Rejected) as caught:
        build_pair(spoil(capture, tmp_path), CLIP, FRAMES, SIZE, limits=limits)
    assert caught.value.reason == reason, caught.value


def test_limits(capture: Capture, pair: Pair, tmp_path: Path) -> None:
    """Each is the border at the pair's own figure."""
    for name, fact, reason in (
        ("min_coverage", "coverage", "too little coverage"),
        ("min_psnr", "psnr_covered", "renders unlike the photos"),
        ("min_angle", "angle_deg", "no parallax"),
    ):
        build_pair(capture, CLIP, FRAMES, SIZE, limits=Limits(**{name: pair.facts[fact] - 1e-3}))
        with pytest.raises(Rejected, match=reason):
            build_pair(capture, CLIP, FRAMES, SIZE, limits=Limits(**{name: pair.facts[fact] + 1e-3}))
    with pytest.raises(Rejected, match="no depth"):
        build_pair(_with(capture, 1, depth=None), CLIP, FRAMES, SIZE, geometry="depth")


def test_cameras_for_another_aspect_are_refused(capture: Capture, tmp_path: Path) -> None:
    folder = write_transforms_scene(tmp_path / "s", None)
    data = json.loads((folder / "transforms.json").read_text())
    for frame in data["frames"]:
        frame["w"] *= 2
    (folder / "transforms.json").write_text(json.dumps(data))
    with pytest.raises(Rejected, match="bad camera"):
        build_pair(read(folder), CLIP, FRAMES, SIZE)
