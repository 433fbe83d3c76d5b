from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from fvgen.io import read_cameras, write_ply, write_transforms
from fvgen.types import Cameras
from fvgen.utils.errors import UserError

NAMES = ["a/0001.jpg", "a/0002.jpg", "b/0001.jpg"]


def cameras(count: int = 3) -> Cameras:
    rng = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = Rotation.random(count, random_state=1).as_matrix()
    poses[:, :3, 3] = rng.normal(size=(count, 3))
    K = np.tile([[70.0, 0, 33], [0, 72, 21], [0, 0, 1]], (count, 1, 1))
    K[:, 0, 0] += np.arange(count)
    return Cameras(torch.from_numpy(K).float(), torch.from_numpy(poses).float(), (40, 60))


def same(a: Cameras, b: Cameras) -> None:
    assert a.image_size == b.image_size
    torch.testing.assert_close(a.K, b.K, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.world_from_cam, b.world_from_cam, rtol=1e-5, atol=1e-5)


def transforms(**changes: Any) -> dict[str, Any]:
    pose = np.eye(4).tolist()
    return {"w": 60, "h": 40, "fl_x": 50.0, "frames": [{"file_path": "images/x", "transform_matrix": pose}], **changes}


def written(folder: Path, data: dict[str, Any]) -> Path:
    (folder / "transforms.json").write_text(json.dumps(data))
    return folder / "transforms.json"


def write_colmap(folder: Path, given: Cameras, binary: bool, model: str = "PINHOLE", extra: tuple[float, ...] = ()) -> None:
    number = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2}[model]
    text: dict[str, list[str]] = {"cameras": ["# comment"], "images": ["# comment"], "points3D": []}
    raw = {"cameras": struct.pack("<Q", len(given)), "images": struct.pack("<Q", len(given)), "points3D": struct.pack("<Q", 1)}
    for i, (K, pose) in enumerate(zip(given.K.double().numpy(), given.world_from_cam.double().numpy(), strict=True)):
        focals = (K[0, 0], K[1, 1]) if model == "PINHOLE" else (K[0, 0],)
        params = (*focals, K[0, 2], K[1, 2], *extra)
        text["cameras"].append(" ".join(map(repr, map(float, params))).join([f"{i} {model} 60 40 ", ""]))
        raw["cameras"] += struct.pack(f"<iiQQ{len(params)}d", i, number, 60, 40, *params)
        w2c = np.linalg.inv(pose)
        x, y, z, w = Rotation.from_matrix(w2c[:3, :3]).as_quat()
        numbers = [float(v) for v in (w, x, y, z, *w2c[:3, 3])]
        text["images"] += [f"{i} {' '.join(map(repr, numbers))} {i} {NAMES[i]}", "" if i else "1.0 2.0 -1 3.0 4.0 7"]
        observations = 0 if i else 2
        raw["images"] += struct.pack("<i7di", i, *numbers, i) + NAMES[i].encode() + b"\0" + struct.pack("<Q", observations)
        raw["images"] += struct.pack("<ddq", 1.0, 2.0, -1) * observations
    text["points3D"].append("7 1.0 2.0 3.0 10 20 30 0.5 0 1")
    raw["points3D"] += struct.pack("<Q3d3BdQii", 7, 1.0, 2.0, 3.0, 10, 20, 30, 0.5, 1, 0, 1)
    for kind in text:
        if binary:
            (folder / f"{kind}.bin").write_bytes(raw[kind])
        else:
            (folder / f"{kind}.txt").write_text("\n".join(text[kind]) + "\n")


def test_transforms_round_trip(tmp_path: Path) -> None:
    write_transforms(tmp_path / "transforms.json", cameras(), NAMES)
    same(read_cameras(tmp_path / "transforms.json", NAMES), cameras())
    order = [2, 0]
    same(read_cameras(tmp_path, ["/somewhere/b/0001.jpg", "else/a/0001.jpg"]), cameras()[order])


def test_transforms_axes_are_opengl(tmp_path: Path) -> None:
    pose = np.eye(4)
    pose[:3, 3] = [1, 2, 3]
    frame = {"file_path": "x.png", "transform_matrix": pose.tolist()}
    got = read_cameras(written(tmp_path, transforms(frames=[frame])), ["x.png"]).world_from_cam[0]
    # The camera looks along the file's -z; our z axis is the viewing direction.
    torch.testing.assert_close(got[:3], torch.tensor([[1.0, 0, 0, 1], [0, -1, 0, 2], [0, 0, -1, 3]]))


@pytest.mark.parametrize("binary", [False, True])
def test_colmap_models(tmp_path: Path, binary: bool) -> None:
    write_colmap(tmp_path, cameras(), binary)
    same(read_cameras(tmp_path, NAMES), cameras())


@pytest.mark.parametrize("binary", [False, True])
def test_colmap_agrees_with_pycolmap(tmp_path: Path, binary: bool) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    model = pycolmap.Reconstruction()
    camera = pycolmap.Camera.create(1, pycolmap.CameraModelId.SIMPLE_RADIAL, 55.0, 60, 40)
    model.add_camera_with_trivial_rig(camera)
    turn = Rotation.from_rotvec([0.1, -0.4, 0.2])
    image = pycolmap.Image(name="x.jpg", camera_id=1, image_id=1)
    model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pycolmap.Rotation3d(turn.as_quat()), np.array([1.0, 2, 3])))
    (model.write_binary if binary else model.write_text)(tmp_path)
    got = read_cameras(tmp_path, ["x.jpg"])
    cam_from_world = torch.linalg.inv(got.world_from_cam[0].double()).numpy()
    np.testing.assert_allclose(cam_from_world[:3, :3], turn.as_matrix(), atol=1e-6)
    np.testing.assert_allclose(cam_from_world[:3, 3], [1, 2, 3], atol=1e-6)
    np.testing.assert_allclose(got.K[0].numpy(), [[55, 0, 30], [0, 55, 20], [0, 0, 1]], atol=1e-5)


def test_distortion(tmp_path: Path) -> None:
    write_colmap(tmp_path, cameras(), False, "SIMPLE_RADIAL", (0.0,))
    assert torch.equal(read_cameras(tmp_path, NAMES).K[:, 0, 0], cameras().K[:, 0, 0])
    write_colmap(tmp_path, cameras(), False, "SIMPLE_RADIAL", (0.01,))
    with pytest.raises(UserError, match="undistort"):
        read_cameras(tmp_path, NAMES)
    with pytest.raises(UserError, match="undistort"):
        read_cameras(written(tmp_path, transforms(k1=0.1)), ["x.jpg"])
    with pytest.raises(UserError, match="undistort"):
        read_cameras(written(tmp_path, transforms(camera_model="OPENCV_FISHEYE")), ["x.jpg"])


def test_intrinsics_follow_the_photo_size(tmp_path: Path) -> None:
    write_transforms(tmp_path / "transforms.json", cameras(), NAMES)
    got = read_cameras(tmp_path, NAMES, (80, 120))
    torch.testing.assert_close(got.K[:, :2], cameras().K[:, :2] * 2)
    with pytest.raises(UserError, match="aspect"):
        read_cameras(tmp_path, NAMES, (60, 60))
    Image.new("RGB", (30, 20)).save(tmp_path / "0002.jpg")
    torch.testing.assert_close(read_cameras(tmp_path, [str(tmp_path / "0002.jpg")]).K[0, :2], cameras().K[1, :2] / 2)


def test_camera_angle_and_stem(tmp_path: Path) -> None:
    frame = {"file_path": "./train/r_0", "transform_matrix": np.eye(4).tolist()}
    path = written(tmp_path, {"camera_angle_x": math.pi / 2, "frames": [frame]})
    got = read_cameras(path, ["x/r_0.png"], (40, 60))
    torch.testing.assert_close(got.K[0], torch.tensor([[30.0, 0, 30], [0, 30, 20], [0, 0, 1]]))
    with pytest.raises(UserError, match="size of"):
        read_cameras(path, ["x/r_0.png"])


def bad(**changes: Any) -> dict[str, Any]:
    pose = np.eye(4)
    for (row, column), value in changes.pop("at", {}).items():
        pose[row, column] = value
    return transforms(frames=[{"file_path": "x.jpg", "transform_matrix": pose.tolist()}], **changes)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (bad(at={(0, 3): math.nan}), "NaN"),
        (bad(at={(0, 0): 1.1}), "not a rotation"),
        (bad(at={(0, 0): -1.0}), "not a rotation"),
        (bad(at={(3, 0): 0.5}), "not a rotation"),
        (bad(fl_x=-3.0), "focal length"),
        (bad(fl_x=math.inf), "focal length"),
        (bad(fl_x=0), "focal length"),
        (bad(fl_y=0.0), "focal length"),
        (bad(fl_x=None), "neither"),
        (transforms(), "not in the camera file"),
        ({"frames": 3}, "not a transforms.json"),
        ({"no": 3}, "not a transforms.json"),
        (transforms(frames=[{"file_path": "x.jpg", "transform_matrix": [[1, 2]]}]), "not 4x4"),
    ],
)
def test_bad_transforms(tmp_path: Path, data: dict[str, Any], word: str) -> None:
    name = "y.jpg" if word.startswith("not in") else "x.jpg"
    with pytest.raises(UserError, match=word) as caught:
        read_cameras(written(tmp_path, data), [name])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 9, 30, 200])
def test_damaged_binary_model(tmp_path: Path, cut: int) -> None:
    write_colmap(tmp_path, cameras(), True)
    data = (tmp_path / "images.bin").read_bytes()
    (tmp_path / "images.bin").write_bytes(data[:cut])
    with pytest.raises(UserError, match="damaged"):
        read_cameras(tmp_path, NAMES)


def test_missing_camera_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_cameras(tmp_path / "nothing", NAMES)
    with pytest.raises(UserError, match="no COLMAP model"):
        read_cameras(tmp_path, NAMES)
    (tmp_path / "transforms.json").write_text("{")
    with pytest.raises(UserError, match=r"not a transforms\.json"):
        read_cameras(tmp_path, NAMES)


def test_ambiguous_names(tmp_path: Path) -> None:
    write_transforms(tmp_path / "transforms.json", cameras(), NAMES)
    with pytest.raises(UserError, match="several"):
        read_cameras(tmp_path, ["c/0001.jpg"])


def test_ply_bytes(tmp_path: Path) -> None:
    points = torch.tensor([[1.0, -2.0, 3.5], [0.0, 1e-3, 7.0]])
    write_ply(tmp_path / "cloud.ply", points, torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.2, -1.0]]))
    header, _, body = (tmp_path / "cloud.ply").read_bytes().partition(b"end_header\n")
    assert header.startswith(b"ply\nformat binary_little_endian 1.0\nelement vertex 2\n")
    rows = [struct.unpack_from("<3f3B", body, 15 * i) for i in range(2)]
    assert len(body) == 30
    assert rows[0] == (1.0, -2.0, 3.5, 0, 128, 255)
    assert rows[1][3:] == (255, 51, 0)
    with pytest.raises(ValueError, match="shape"):
        write_ply(tmp_path / "bad.ply", points, torch.zeros(1, 3))
