"""Each layout against the cameras it was written from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from fvgen.data.clips import Rejected, clip_cameras, load_clip, read_depth
from fvgen.data.layouts import Capture, find_captures, locate, read_capture
from fvgen.geometry.resize import scale_cameras
from fvgen.utils.errors import UserError
from tests.data.scenes import (
    COUNT,
    SIZE,
    truth,
    write_colmap_scene,
    write_dl3dv_scene,
    write_realestate_scene,
    write_transforms_scene,
)

WRITERS: dict[str, Callable[[Path], Path]] = {
    "transforms": write_transforms_scene,
    "dl3dv": write_dl3dv_scene,
    "colmap": write_colmap_scene,
    "realestate10k": write_realestate_scene,
}


def only(folder: Path, size: tuple[int, int] = (40, 64)) -> Capture:
    (found,) = find_captures(folder)
    return read_capture(found, size)


def changed(folder: Path, change: Callable[[dict], None]) -> None:
    file = folder / "transforms.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("layout", WRITERS)
def test_cameras_and_order(tmp_path: Path, layout: str) -> None:
    made, capture = truth(), only(WRITERS[layout](tmp_path))
    assert (len(capture.frames), capture.missing) == (COUNT, 0)
    photos = load_clip(capture, range(COUNT))
    assert photos.images.size == ((2 * SIZE[0], 2 * SIZE[1]) if layout == "dl3dv" else SIZE)
    wanted = scale_cameras(made.cameras, photos.images.size)
    torch.testing.assert_close(photos.cameras.K, wanted.K, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(photos.cameras.world_from_cam, wanted.world_from_cam, rtol=1e-5, atol=1e-5)
    if layout != "dl3dv":  # enlarged there
        assert (photos.images.rgb - made.rgb).abs().max() < 0.6 / 255


def test_all_layouts_in_one_tree(tmp_path: Path) -> None:
    write_transforms_scene(tmp_path / "b" / "one" / "nerfstudio")
    write_colmap_scene(tmp_path / "b" / "two")
    write_dl3dv_scene(tmp_path / "1K" / "hash")
    write_realestate_scene(tmp_path / "train", "x.y")
    (tmp_path / "train" / "notes.txt").write_text("not a clip\n")
    (tmp_path / "train" / "loop").symlink_to(tmp_path / "train", target_is_directory=True)
    found = [(f.name, f.layout) for f in find_captures(tmp_path)]
    assert found == [
        ("1K/hash", "transforms"),
        ("b/one/nerfstudio", "transforms"),
        ("b/two", "colmap"),
        ("train/x.y", "realestate10k"),
    ]
    for name, layout in found:
        assert locate(tmp_path, name, layout) in find_captures(tmp_path)


@pytest.mark.parametrize("layout", ["transforms", "colmap"])
def test_a_capture_itself_has_the_name_of_its_folder(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = WRITERS[layout](tmp_path / "room" / "one")
    monkeypatch.chdir(folder / "images")
    for asked in (folder, Path(".."), folder / "images" / ".."):
        (found,) = find_captures(asked)
        assert (found.name, found.layout) == ("one", layout)
        assert locate(asked, found.name, layout) == found
    for found in find_captures(tmp_path):
        assert locate(tmp_path, found.name, layout) == found


@pytest.mark.parametrize(("size", "folder"), [((40, 64), "images_2"), ((250, 400), "images_2"), ((300, 500), "images")])
def test_the_smallest_images_that_suffice_are_taken(tmp_path: Path, size: tuple[int, int], folder: str) -> None:
    names = [f"images/{i}.png" for i in range(2)]
    for scale, pixels in (("", (576, 960)), ("_2", (288, 480)), ("_4", (144, 240))):
        (tmp_path / f"images{scale}").mkdir()
        for i in range(2):
            Image.fromarray(np.zeros((*pixels, 3), np.uint8)).save(tmp_path / f"images{scale}" / f"{i}.png")
    pose = np.eye(4).tolist()
    frames = [{"file_path": name, "transform_matrix": pose} for name in names]
    (tmp_path / "transforms.json").write_text(json.dumps({"w": 960, "h": 576, "fl_x": 900, "frames": frames}))
    capture = only(tmp_path, size)
    assert {f.image.parent.name for f in capture.frames} == {folder}
    (tmp_path / folder / "1.png").unlink()  # fewer files count more than the right size
    assert {f.image.parent.name for f in only(tmp_path, size).frames} != {folder}


def test_images_in_folders_of_their_own(tmp_path: Path) -> None:
    """A COLMAP model of a rig names ``left/0.png`` and ``right/0.png``."""
    write_colmap_scene(tmp_path)
    text = (tmp_path / "sparse" / "0" / "images.txt").read_text()
    for side, numbers in (("left", (8, 9)), ("right", (10, 11))):
        (tmp_path / "images" / side).mkdir()
        for i, number in enumerate(numbers):
            text = text.replace(f"IMG_{number}.png", f"{side}/{i}.png")
            (tmp_path / "images" / f"IMG_{number}.png").rename(tmp_path / "images" / side / f"{i}.png")
    (tmp_path / "sparse" / "0" / "images.txt").write_text(text)
    files = [f.image.relative_to(tmp_path / "images").as_posix() for f in only(tmp_path).frames]
    assert files == [*(f"IMG_{i}.png" for i in (12, 13, 14, 15)), "left/0.png", "left/1.png", "right/0.png", "right/1.png"]


def test_missing_images_are_counted(tmp_path: Path) -> None:
    write_transforms_scene(tmp_path)
    (tmp_path / "images" / "frame_00003.png").unlink()
    capture = only(tmp_path)
    assert (len(capture.frames), capture.missing) == (COUNT - 1, 1)
    assert [f.camera.name[-9:-4] for f in capture.frames][:3] == ["00001", "00002", "00004"]


@pytest.mark.parametrize(("kind", "unit"), [("npy", None), ("png", None), ("png", 0.002), ("npy", 0.5)])
def test_depth(tmp_path: Path, kind: str, unit: float | None) -> None:
    """Arrays are in world units, images in millimetres, unless the file states the unit of both."""
    write_transforms_scene(tmp_path, kind)
    if unit:
        changed(tmp_path, lambda data: data.update(depth_unit_scale_factor=unit))
    depth = load_clip(only(tmp_path), range(1, 4)).depth
    assert depth is not None
    factor = {"npy": unit or 1.0, "png": (unit or 0.001) * 1000}[kind]
    torch.testing.assert_close(depth, truth().depth[[1, 3]] * factor, rtol=1e-6, atol=6e-4 * factor if kind == "png" else 0)


def test_bad_depth(tmp_path: Path) -> None:
    np.save(tmp_path / "holes.npy", np.array([[1.0, np.nan], [np.inf, -2.0]]))
    assert read_depth(tmp_path / "holes.npy", 2.0).tolist() == [[2, 0], [0, -4]]
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "colour.npy", np.zeros((4, 4, 3)))
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    for name in ("objects.npy", "colour.npy", "torn.png", "none.png"):
        with pytest.raises(UserError, match=name):
            read_depth(tmp_path / name, 1.0)


def pattern(rays: np.ndarray) -> np.ndarray:
    """A smooth picture of the directions ``[..., 2]`` (x/z, y/z), ``[..., 3]`` in [0, 1]."""
    x, y = rays[..., 0], rays[..., 1]
    return np.stack([0.5 + 0.4 * np.sin(9 * x + 4 * y), 0.5 + 0.4 * np.cos(7 * y - 3 * x), 0.5 + 0.3 * np.sin(6 * x * y)], -1)


def test_lens_distortion_is_undone(tmp_path: Path) -> None:
    """The photo shows a function of the ray. Distorted, each pixel's ray is that of the lens model; afterwards that of ``K``."""
    size, f = (150, 240), 200.0
    lens = {"k1": -0.12, "k2": 0.03, "p1": 0.002, "p2": -0.001}
    K = np.array([[f, 0, 118.0], [0, f, 77.0], [0, 0, 1]])
    half = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    grid = np.mgrid[0 : size[0], 0 : size[1]][::-1].reshape(2, -1).T.astype(np.float64)
    seen = cv2.undistortPoints(grid[:, None], K - half, np.array([*lens.values(), 0.0]), None, None, None)
    rays = seen.reshape(*size, 2)
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.fromarray((pattern(rays) * 255 + 0.5).astype(np.uint8)).save(tmp_path / "images" / f"{i}.png")
        np.save(tmp_path / f"{i}.npy", 3 + rays[..., 0])
    pose = np.eye(4).tolist()
    frames = [{"file_path": f"images/{i}.png", "depth_file_path": f"{i}.npy", "transform_matrix": pose} for i in range(2)]
    data = {"w": size[1], "h": size[0], "fl_x": f, "fl_y": f, "cx": 118.0, "cy": 77.0, **lens, "frames": frames}
    (tmp_path / "transforms.json").write_text(json.dumps(data))
    photos = load_clip(only(tmp_path), range(2))
    v, u = np.mgrid[0 : size[0], 0 : size[1]] + 0.5
    now = (np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(photos.cameras.K[0].double().numpy()).T)[..., :2]
    error = np.abs(photos.images.rgb[0].permute(1, 2, 0).numpy() - pattern(now))
    assert error.max() < 1.5 / 255
    assert np.abs(pattern(rays) - pattern(now)).max() > 0.05  # the test would notice
    assert photos.depth is not None
    assert np.abs(photos.depth[0].numpy() - 3 - now[..., 0]).max() < 0.8 / f  # the nearest pixel


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        find_captures(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no clips"):
        find_captures(tmp_path)
    write_realestate_scene(tmp_path / "r")
    file = tmp_path / "r" / "0a1b2c.txt"
    file.write_text(file.read_text() + "99 1 2\n")
    with pytest.raises(UserError, match="3 columns"):
        only(tmp_path / "r")
    write_transforms_scene(tmp_path / "t")
    changed(tmp_path / "t", lambda data: data.update(depth_unit_scale_factor=-1))
    with pytest.raises(UserError, match="depth_unit_scale_factor"):
        only(tmp_path / "t")
    changed(tmp_path / "t", lambda data: data["frames"][2].update(transform_matrix=(np.eye(4) * np.nan).tolist()))
    changed(tmp_path / "t", lambda data: data.pop("depth_unit_scale_factor"))
    capture = only(tmp_path / "t")  # one bad pose spoils the clips it is in, not the capture
    assert clip_cameras(capture, range(3, 6), SIZE).image_size == SIZE
    with pytest.raises(Rejected, match="NaN"):
        clip_cameras(capture, range(1, 4), SIZE)
