"""The ways to a video that differ on a GPU: DUSt3R there, weights that visit it, clip after clip."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fvgen.estimators import Dust3rEstimator
from fvgen.io import read_images
from tests.cli.conftest import Photos, Run

pytestmark = pytest.mark.gpu
Report = Callable[[Path], dict]


def files(root: Path, folder: str) -> dict[str, bytes]:
    """The files of a folder of the output."""
    return {p.name: p.read_bytes() for p in sorted((root / folder).iterdir())}


def pixels(root: Path, folder: str) -> np.ndarray:
    """``[T, H, W, 3]`` of a folder of frames, 0 to 255."""
    return np.stack([np.asarray(Image.open(p)).astype(float) for p in sorted((root / folder).iterdir())])


def test_geometry_is_that_of_the_cpu(scene: Photos, converted: Path) -> None:
    """In TF32, whose products have 11 bits: to a hundredth for nearly all pixels of the first photo.

    Not the second one's: a random network's photos agree on no pose, so rounding decides where RANSAC puts that camera.
    """
    photos = read_images(scene.photos[:2])
    expected, found = (Dust3rEstimator(converted, device)(photos) for device in ("cpu", "cuda"))
    assert found.points.device.type == found.cameras.K.device.type == "cpu"
    # a focal length is a mean over rays, as far off as the points they come from, and twice that to be safe
    torch.testing.assert_close(found.cameras.K, expected.cameras.K, rtol=0.02, atol=0.5)
    valid = (found.confidence[0] > 0) & (expected.confidence[0] > 0)
    assert valid.float().mean() > 0.5
    apart = (found.points[0] - expected.points[0])[valid].norm(dim=-1) / expected.points[0][valid].norm(dim=-1)
    assert apart.quantile(0.9) < 0.01


def test_learned_geometry_with_and_without_offload(
    fvgen: Run, scene: Photos, converted: Path, report: Report, tmp_path: Path
) -> None:
    """The same renders to the byte: DUSt3R computes the same wherever its weights wait. The VAE takes fewer frames at a time."""
    command = ["generate", *scene.photos[:2], "--dust3r-weights", converted, "--frames", 6, "--device", "cuda"]
    for name, options in (("whole", []), ("again", []), ("lean", ["--cpu-offload"])):
        status, _, err = fvgen(*command, *options, "--output", tmp_path / name)
        assert status == 0, err
    whole, again, lean = (tmp_path / name for name in ("whole", "again", "lean"))
    assert files(whole, "frames") == files(again, "frames")
    assert files(whole, "renders") == files(lean, "renders")
    assert np.abs(pixels(whole, "frames") - pixels(lean, "frames")).mean() < 0.01 * 255
    told = report(whole)
    assert told["device"] == torch.cuda.get_device_name()
    assert told["geometry"]["estimator"] == "dust3r, estimated cameras"
    assert told["photo_frames"] == [0, 5]


def test_clip_after_clip(fvgen: Run, scene: Photos, converted: Path, report: Report, tmp_path: Path) -> None:
    """The third clip's geometry is an alignment of five photos, four of which were generated."""
    command = ["generate", scene.photos[0], "--dust3r-weights", converted, "--trajectory", "orbit:deg=4", "--frames", 8]
    command += ["--then", "nbv:phi=5", "nbv:phi=5", "--device", "cuda"]
    for name in ("a", "b"):
        status, _, err = fvgen(*command, "--output", tmp_path / name)
        assert status == 0, err
    assert files(tmp_path / "a", "frames") == files(tmp_path / "b", "frames")
    told = report(tmp_path / "a")
    assert told["frames"] == len(files(tmp_path / "a", "frames")) == 22
    assert told["segments"] == [[0, 7], [7, 14], [14, 21]]
    assert len(told["geometry"]["coverage"]) == 5
    frames, renders = pixels(tmp_path / "a", "frames"), pixels(tmp_path / "a", "renders")
    assert np.abs(frames[0] - renders[0]).mean() < 30  # the photo, through the model
    assert frames.std((1, 2, 3)).min() > 1  # no frame is empty
