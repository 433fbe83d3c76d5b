from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fvgen.geometry.conventions import invert_rigid
from fvgen.geometry.trajectory import centre_depth, parse_trajectory, target_cameras
from fvgen.io import write_transforms
from fvgen.types import Cameras, ImageSet, Scene
from fvgen.utils.errors import UserError
from tests.geometry.synthetic import pose, rays

SIZE = (12, 16)
DEPTH = 2.5


def scene(views: int = 3) -> Scene:
    """Photos whose every pixel sees depth ``DEPTH``."""
    K = torch.tensor([[20.0, 0, 8], [0, 21, 6], [0, 0, 1]]).repeat(views, 1, 1)
    K[:, 0, 0] += torch.arange(views)
    poses = np.stack([pose((0.4 * i, 0.1 * i * i, 0), (0, -5.0 * i, 3.0 * i)) for i in range(views)])
    world_from_cam = torch.from_numpy(poses).float()
    local = torch.stack([torch.from_numpy(rays(k.numpy(), SIZE) * DEPTH).float() for k in K])
    points = torch.einsum("vij,vhwj->vhwi", world_from_cam[:, :3, :3], local) + world_from_cam[:, None, None, :3, 3]
    images = ImageSet(torch.zeros(views, 3, *SIZE), ("a",) * views, (None,) * views)
    return Scene(images, Cameras(K, world_from_cam, SIZE), points, torch.ones(views, *SIZE))


def relative(cameras: Cameras, anchor: torch.Tensor) -> torch.Tensor:
    return invert_rigid(anchor) @ cameras.world_from_cam


@pytest.mark.parametrize("name", ["smooth", "interp"])
def test_between_photos_shares_the_photos(name: str) -> None:
    s = scene()
    path = target_cameras(s, name, 9)
    assert len(path) == 2 * 8 + 1
    assert path.world_from_cam.dtype == torch.float32
    torch.testing.assert_close(path.world_from_cam[::8], s.cameras.world_from_cam)
    torch.testing.assert_close(path.K[[0, -1]], s.cameras.K[[0, -1]])
    R = path.world_from_cam[:, :3, :3]
    torch.testing.assert_close(R @ R.mT, torch.eye(3).expand(17, 3, 3), rtol=0, atol=1e-5)


def test_smooth_keeps_the_photos_bit_for_bit_and_interpolates_the_focal_length() -> None:
    s = scene()
    path = target_cameras(s, "smooth", 5)
    assert torch.equal(path.world_from_cam[::4], s.cameras.world_from_cam)
    torch.testing.assert_close(path.K[:, 0, 0], torch.linspace(20, 22, 9))


def test_orbit_keeps_its_distance_and_looks_at_the_centre() -> None:
    s = scene()
    path = target_cameras(s, "orbit:deg=30,photo=1", 7)
    moved = relative(path, s.cameras.world_from_cam[1])
    pivot = torch.tensor([0.0, 0.0, DEPTH])
    torch.testing.assert_close(path.world_from_cam[0], s.cameras.world_from_cam[1])
    torch.testing.assert_close((moved[:, :3, 3] - pivot).norm(dim=1), torch.full((7,), DEPTH))
    torch.testing.assert_close(moved[:, :3, 3] + DEPTH * moved[:, :3, 2], pivot.expand(7, 3), rtol=0, atol=1e-5)
    assert moved[-1, 0, 3].item() == pytest.approx(DEPTH * 0.5, rel=1e-5)  # to the right by sin 30
    assert moved[:, 1, 3].abs().max() < 1e-5


def test_spiral_returns_and_looks_at_the_centre() -> None:
    s = scene()
    moved = relative(target_cameras(s, "spiral:deg=10,turns=2", 41), s.cameras.world_from_cam[0])
    torch.testing.assert_close(moved[[0, -1]], torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)
    centre = moved[:, :3, 3] + DEPTH * moved[:, :3, 2]
    torch.testing.assert_close(centre, torch.tensor([0.0, 0.0, DEPTH]).expand(41, 3), rtol=0, atol=1e-5)
    assert torch.rad2deg(torch.arccos(moved[20, 2, 2])).item() == pytest.approx(10, abs=0.05)


def test_dolly_moves_along_the_axis() -> None:
    s = scene()
    moved = relative(target_cameras(s, "dolly:forward=-0.4", 5), s.cameras.world_from_cam[0])
    torch.testing.assert_close(moved[:, :3, 3], torch.linspace(0, -0.4 * DEPTH, 5)[:, None] * torch.tensor([0.0, 0, 1]))


def test_target_and_text_start_at_the_photo_and_agree(tmp_path: Path) -> None:
    s = scene()
    (tmp_path / "path.txt").write_text("0 12\n0 -5\n0 0.3\n")
    by_target = target_cameras(s, "target:phi=12,theta=-5,r=0.3", 6)
    by_text = target_cameras(s, f"txt:{tmp_path / 'path.txt'}", 6)
    torch.testing.assert_close(by_target.world_from_cam[0], s.cameras.world_from_cam[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(by_target.world_from_cam, by_text.world_from_cam, rtol=0, atol=1e-5)
    moved = relative(by_target, s.cameras.world_from_cam[0])
    pivot = torch.tensor([0.0, 0.0, DEPTH])
    distance = (moved[:, :3, 3] - pivot).norm(dim=1)
    assert distance[0].item() == pytest.approx(DEPTH, rel=1e-5)
    assert (distance[1:] != distance[:-1]).all()


def test_camera_file(tmp_path: Path) -> None:
    s = scene()
    wanted = target_cameras(s, "orbit", 4)
    write_transforms(tmp_path / "path.json", wanted, [f"frame{i}.png" for i in range(4)])
    got = target_cameras(s, f"cameras:{tmp_path / 'path.json'}")
    torch.testing.assert_close(got.world_from_cam, wanted.world_from_cam)
    torch.testing.assert_close(got.K, wanted.K)


def test_depth_at_a_hole_falls_back_to_the_median() -> None:
    s = scene(1)
    s.confidence[0, SIZE[0] // 2, SIZE[1] // 2] = 0
    s.points[0, SIZE[0] // 2, SIZE[1] // 2] = 99
    assert centre_depth(s, 0) == pytest.approx(DEPTH)
    s.confidence[:] = 0
    assert centre_depth(s, 0) == 1.0


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("wobble", "known paths: smooth, interp, orbit, spiral, dolly, target, nbv, txt, cameras"),
        ("", "known paths"),
        ("orbit:angle=3", "its parameters: deg, photo"),
        ("smooth:deg=3", "its parameters: none"),
        ("orbit:deg=0", "does not move"),
        ("dolly:forward=0", "does not move"),
        ("spiral:turns=0", "does not move"),
        ("target", "does not move"),
        ("nbv:phi=0", "does not move"),
        ("nbv:candidates=4", "2 or 3 candidates"),
        ("nbv:candidates=2.5", "must be a whole number"),
        ("orbit:deg=nan", "finite"),
        ("orbit:deg=inf", "finite"),
        ("orbit:deg=much", "must be a number"),
        ("orbit:deg", "must be a number"),
        ("orbit:photo=0.5", "whole number"),
        ("txt", "needs a file"),
        ("cameras:", "needs a file"),
        ("txt:nowhere.txt", "does not exist"),
    ],
)
def test_bad_specifications(spec: str, word: str) -> None:
    with pytest.raises(UserError, match=word) as caught:
        parse_trajectory(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["0 1\n0 1\n", "0 1\n0 x\n0 1\n", "0 1\n0 nan\n0 1\n", "0\n0 1\n0 1\n", "0 0\n0 0\n0 0\n"])
def test_bad_text_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "path.txt").write_text(text)
    with pytest.raises(UserError, match=r"path\.txt"):
        target_cameras(scene(), f"txt:{tmp_path / 'path.txt'}")


def test_bad_requests() -> None:
    with pytest.raises(UserError, match="at least 2 frames"):
        target_cameras(scene(), "orbit", 1)
    with pytest.raises(UserError, match="no photo 7"):
        target_cameras(scene(), "orbit:photo=7")
    with pytest.raises(UserError, match="two photos"):
        target_cameras(scene(1), "smooth")
