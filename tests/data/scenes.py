"""Captures of two textured planes on disk, in every layout; cameras and depth are known in closed form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import Tensor

from fvgen.geometry.conventions import opengl_from_opencv
from fvgen.io import write_transforms
from fvgen.types import Cameras
from tests.geometry.synthetic import capture, pose

SIZE = (96, 152)
COUNT = 8


@dataclass(frozen=True)
class Truth:
    """``rgb [V, 3, H, W]``, ``cameras`` and ``depth [V, H, W]`` of a capture."""

    rgb: Tensor
    cameras: Cameras
    depth: Tensor


@cache
def truth(count: int = COUNT, step: float = 0.12) -> Truth:
    """A row of photos, turning a little; ``step`` world units apart."""
    places = [pose((step * i - 0.4, 0.03 * i, 0.01 * i), (0.2 * i, -1.2 * i, 0.1 * i)) for i in range(count)]
    images, cameras, depth = capture(places, SIZE)
    return Truth(images.rgb, cameras, depth.float())


def write_images(folder: Path, rgb: Tensor, names: list[str], size: tuple[int, int] | None = None) -> None:
    """PNG files, resampled to ``size`` (H, W)."""
    for name, frame in zip(names, rgb, strict=True):
        pixels = (frame.permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
        if size is not None:
            pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_AREA)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / name)


def write_depth(folder: Path, depth: Tensor, kind: str) -> None:
    """``depth/0000`` ... as 16-bit millimetres (png) or in world units (npy), and into ``transforms.json``."""
    (folder / "depth").mkdir()
    data = json.loads((folder / "transforms.json").read_text())
    for i, (values, frame) in enumerate(zip(depth.numpy(), data["frames"], strict=True)):
        frame["depth_file_path"] = f"depth/{i:04d}.{kind}"
        if kind == "npy":
            np.save(folder / frame["depth_file_path"], values)
        else:
            cv2.imwrite(str(folder / frame["depth_file_path"]), (values * 1000 + 0.5).astype(np.uint16))
    (folder / "transforms.json").write_text(json.dumps(data))


def write_transforms_scene(folder: Path, depth: str | None = "npy", of: Truth | None = None) -> Path:
    """nerfstudio: ``images``, ``transforms.json`` and depth."""
    made = of or truth()
    names = [f"images/frame_{i + 1:05d}.png" for i in range(len(made.rgb))]
    write_images(folder, made.rgb, names)
    write_transforms(folder / "transforms.json", made.cameras, names)
    if depth:
        write_depth(folder, made.depth, depth)
    return folder


def write_dl3dv_scene(folder: Path, scales: tuple[int, ...] = (4, 8)) -> Path:
    """Intrinsics for a resolution eight times ``SIZE`` at ``images_8``, of which only reductions are there."""
    made = truth()
    names = [f"frame_{i + 1:05d}.png" for i in range(COUNT)]
    for scale in scales:
        write_images(folder / f"images_{scale}", made.rgb, names, (8 * SIZE[0] // scale, 8 * SIZE[1] // scale))
    K = made.cameras.K[0] * 8
    data = {"w": 8 * SIZE[1], "h": 8 * SIZE[0], "fl_x": K[0, 0].item(), "fl_y": K[1, 1].item()}
    data |= {"cx": K[0, 2].item(), "cy": K[1, 2].item(), "k1": 0.0, "k2": 0.0, "p1": 0.0, "p2": 0.0, "camera_model": "OPENCV"}
    poses = opengl_from_opencv(made.cameras.world_from_cam.double()).tolist()
    data["frames"] = [
        {"file_path": f"images/{name}", "transform_matrix": p, "colmap_im_id": i}
        for i, (name, p) in enumerate(zip(names, poses, strict=True))
    ][::-1]  # as nerfstudio's tools may write them: in another order than they were taken
    (folder / "transforms.json").write_text(json.dumps(data))
    return folder


def write_colmap_scene(folder: Path) -> Path:
    """``images`` and a text model in ``sparse/0``; image ids against the order of the names."""
    made = truth()
    names = [f"IMG_{i + 8}.png" for i in range(COUNT)]  # 8, 9, 10, ...
    write_images(folder / "images", made.rgb, names)
    model = folder / "sparse" / "0"
    model.mkdir(parents=True)
    K = made.cameras.K[0].double()
    (model / "cameras.txt").write_text(f"1 PINHOLE {SIZE[1]} {SIZE[0]} {K[0, 0]:.9f} {K[1, 1]:.9f} {K[0, 2]:.9f} {K[1, 2]:.9f}\n")
    rows = []
    for i in reversed(range(COUNT)):
        cam_from_world = np.linalg.inv(made.cameras.world_from_cam[i].double().numpy())
        x, y, z, w = Rotation.from_matrix(cam_from_world[:3, :3]).as_quat()
        numbers = " ".join(f"{v:.12f}" for v in (w, x, y, z, *cam_from_world[:3, 3]))
        rows += [f"{COUNT - i} {numbers} 1 {names[i]}", ""]
    (model / "images.txt").write_text("\n".join(rows) + "\n")
    return folder


def write_realestate_scene(folder: Path, name: str = "0a1b2c") -> Path:
    """``NAME.txt`` beside ``NAME/TIMESTAMP.png``, with the columns of the data set."""
    made = truth()
    stamps = [9_933_000 + 33_000 * i for i in range(COUNT)]  # their number of digits changes on the way
    write_images(folder / name, made.rgb, [f"{stamp}.png" for stamp in stamps])
    lines = ["https://www.youtube.com/watch?v=xxxxxxxxxxx"]
    for i, stamp in enumerate(stamps):
        K = made.cameras.K[i].double()
        numbers = [K[0, 0] / SIZE[1], K[1, 1] / SIZE[0], K[0, 2] / SIZE[1], K[1, 2] / SIZE[0], 0, 0]
        cam_from_world = torch.linalg.inv(made.cameras.world_from_cam[i].double())[:3].flatten().tolist()
        lines.append(" ".join([str(stamp), *(f"{float(v):.9f}" for v in (*numbers, *cam_from_world))]))
    (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder
