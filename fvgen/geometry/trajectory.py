"""Target cameras from a scene and a path specification such as ``smooth``, ``orbit:deg=20`` or ``txt:loop.txt``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fvgen.geometry import se3
from fvgen.geometry import viewcrafter_paths as vc
from fvgen.types import Cameras, Scene
from fvgen.utils.errors import UserError

# Parameters of each path with their defaults. `photo` counts from 0.
NUMBERS: dict[str, dict[str, float]] = {
    "smooth": {},
    "interp": {},
    "orbit": {"deg": 20.0, "photo": 0},
    "spiral": {"deg": 8.0, "turns": 1.0, "photo": 0},
    "dolly": {"forward": 0.2, "photo": 0},
    "target": {"phi": 0.0, "theta": 0.0, "r": 0.0, "x": 0.0, "y": 0.0, "photo": 0, "elevation": vc.ELEVATION_DEG},
    "nbv": {"phi": 20.0, "theta": 10.0, "r": 0.0, "candidates": 3, "photo": 0, "elevation": vc.ELEVATION_DEG},
}
FILES = ("txt", "cameras")
ELEVATED = ("target", "nbv")  # turn about axes that are tilted against the photo by their elevation
NEEDS_MOTION = {
    "orbit": ("deg",),
    "spiral": ("deg", "turns"),
    "dolly": ("forward",),
    "target": ("phi", "theta", "r", "x", "y"),
    "nbv": ("phi",),
}


@dataclass(frozen=True)
class Trajectory:
    """A parsed path specification; ``numbers`` holds every parameter of the path, ``file`` the file of txt and cameras."""

    name: str
    numbers: dict[str, float] = field(default_factory=dict)
    file: Path | None = None


def parse_trajectory(spec: str) -> Trajectory:
    """Parse ``NAME``, ``NAME:key=value,...`` or ``NAME:FILE``.

    - ``smooth``: twice differentiable path through the photos (default). ``interp``: ViewCrafter's interpolation.
    - ``orbit:deg=20``: from the photo around the scene's centre, positive to the right.
    - ``spiral:deg=8,turns=1``: a loop of that half angle, looking at the centre, starting and ending at the photo.
    - ``dolly:forward=0.2``: along the viewing axis, in fractions of the median depth.
    - ``target:phi=,theta=,r=,x=,y=``: ViewCrafter's relative target; degrees, fraction of the centre depth, pixels.
    - ``nbv:phi=20,theta=10``: to the target, of up to three that differ in theta, from which the points cover least.
    - ``txt:FILE``: ViewCrafter's text file of phi, theta and r lists. ``cameras:FILE``: transforms.json or COLMAP model;
      ``cameras:FILE:FIRST-LAST`` takes only those of its cameras, counted from 0, both included.

    Raises:
        UserError: unknown name or parameter, a value that is no finite number, no motion at all, or a missing file.
    """
    name, _, rest = spec.strip().partition(":")
    if name in FILES:
        if not rest:
            raise UserError(f"the path {name} needs a file: {name}:FILE")
        file, wanted = rest, re.fullmatch(r"(.+):(\d+)-(\d+)", rest)
        picked: dict[str, float] = {}
        if name == "cameras" and wanted and not Path(rest).exists():
            file, picked = wanted[1], {"first": int(wanted[2]), "last": int(wanted[3])}
        if not Path(file).exists():
            raise UserError(f"{file} does not exist; check the file of the path {name}")
        return Trajectory(name, picked, Path(file))
    if name not in NUMBERS:
        raise UserError(f"unknown camera path {name!r}; known paths: {', '.join([*NUMBERS, *FILES])}")
    numbers = dict(NUMBERS[name])
    for part in filter(None, (p.strip() for p in rest.split(","))):
        key, _, text = part.partition("=")
        if key not in numbers:
            known = ", ".join(numbers) or "none"
            raise UserError(f"the path {name} has no parameter {key!r}; its parameters: {known}")
        numbers[key] = _finite(text, f"{key} of the path {name}")
    if name in NEEDS_MOTION:
        moving = [numbers[key] for key in NEEDS_MOTION[name]]
        if not any(moving) or (name == "spiral" and not all(moving)):
            raise UserError(f"the path {name} does not move; give {' or '.join(NEEDS_MOTION[name])} a value other than 0")
    for key in ("photo", "candidates"):
        if key in numbers and numbers[key] != int(numbers[key]):
            raise UserError(f"{key} of the path {name} must be a whole number")
    if "candidates" in numbers and not 2 <= numbers["candidates"] <= 3:
        raise UserError("the path nbv chooses among 2 or 3 candidates")
    return Trajectory(name, numbers)


def target_cameras(scene: Scene, trajectory: Trajectory | str = "smooth", frames: int = 25) -> Cameras:
    """Cameras ``[T]`` along the path, at the scene's image size, float32.

    ``smooth`` and ``interp`` give ``frames`` per pair of neighbouring photos, which share the photo between them:
    ``T = (V - 1) * (frames - 1) + 1``. ``cameras`` gives the cameras of the file, in its order and in the scene's world.
    All others give ``T = frames`` and start at the photo ``photo``.

    Raises:
        UserError: fewer than 2 frames, a photo that is not there, one photo where the path needs two, or a bad file.
    """
    if isinstance(trajectory, str):
        trajectory = parse_trajectory(trajectory)
    if frames < 2:
        raise UserError(f"a camera path needs at least 2 frames, not {frames}")
    cameras, name, numbers = scene.cameras, trajectory.name, trajectory.numbers
    if name == "nbv":
        raise ValueError("choose one of next_view_targets first")
    if name == "cameras":
        return _from_file(trajectory, cameras.image_size)
    if name in ("smooth", "interp"):
        if len(cameras) < 2:
            raise UserError(f"the path {name} needs two photos or more; with one photo use orbit, spiral, dolly, target or txt")
        return _between(cameras, frames, name)
    index = int(numbers.get("photo", 0))
    if not -len(cameras) <= index < len(cameras):
        raise UserError(f"there is no photo {index}; the scene has the photos 0 to {len(cameras) - 1}")
    K, anchor = cameras.K[index].double(), cameras.world_from_cam[index].double()
    t = torch.linspace(0, 1, frames, dtype=torch.float64)
    if name in ("txt", "target"):
        poses = _viewcrafter(trajectory, anchor, centre_depth(scene, index), float(K[0, 0]), frames)
    else:
        poses = _around(name, numbers, anchor, median_depth(scene, index), t)
    poses = poses.to(cameras.world_from_cam.dtype)
    return Cameras(cameras.K[index].expand(frames, 3, 3).clone(), poses, cameras.image_size)


def next_view_targets(trajectory: Trajectory) -> list[Trajectory]:
    """The targets among which the path ``nbv`` chooses: straight to the side, below or above, and half as far the other way."""
    numbers = dict(trajectory.numbers)
    count, theta = int(numbers.pop("candidates")), numbers["theta"]
    return [Trajectory("target", {**numbers, "theta": each, "x": 0.0, "y": 0.0}) for each in (0.0, -theta, theta / 2)[:count]]


def _finite(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{what} must be a number, not {text!r}") from None
    if not math.isfinite(value):
        raise UserError(f"{what} must be a finite number, not {text!r}")
    return value


def _depths(scene: Scene, index: int) -> Tensor:
    """``[H, W]`` z of the photo's points in its own camera, NaN where there is none."""
    pose = scene.cameras.world_from_cam[index].double()
    z = (scene.points[index].double() - pose[:3, 3]) @ pose[:3, 2]
    return torch.where(scene.confidence[index] > 0, z, torch.nan)


def median_depth(scene: Scene, index: int) -> float:
    """Median z of a photo's points, world units; 1 where it has none."""
    value = float(_depths(scene, index).nanmedian())
    return value if math.isfinite(value) and value > 0 else 1.0


def centre_depth(scene: Scene, index: int) -> float:
    """z at the middle pixel ``[H // 2, W // 2]``, or the median where that pixel has no point."""
    depths = _depths(scene, index)
    value = float(depths[depths.shape[0] // 2, depths.shape[1] // 2])
    return value if math.isfinite(value) and value > 0 else median_depth(scene, index)


def _between(cameras: Cameras, frames: int, name: str) -> Cameras:
    K, poses, size = cameras.K, cameras.world_from_cam, cameras.image_size
    if name == "interp":
        focals, centres = torch.stack([K[:, 0, 0], K[:, 1, 1]], -1), K[:, :2, 2]
        path, focal, centre = vc.interpolated_path(poses, focals, centres, frames)
        out = torch.eye(3, dtype=K.dtype).repeat(len(path), 1, 1)
        out[:, 0, 0], out[:, 1, 1], out[:, :2, 2] = focal[:, 0], focal[:, 1], centre
        return Cameras(out, path.to(poses.dtype), size)
    steps = torch.arange((len(cameras) - 1) * (frames - 1) + 1, dtype=torch.float64)
    t = steps / (frames - 1)
    path = se3.spline(poses, t)
    left = t.floor().long().clamp(max=len(cameras) - 2)
    share = (t - left).to(K.dtype)[:, None, None]
    out = torch.lerp(K[left], K[left + 1], share)
    # The photos themselves, free of rounding.
    path[:: frames - 1], out[:: frames - 1] = poses, K
    return Cameras(out, path, size)


def _around(name: str, numbers: dict[str, float], anchor: Tensor, depth: float, t: Tensor) -> Tensor:
    """Poses relative to the anchor camera; its axes are x right, y down, z forward and the pivot lies at (0, 0, depth)."""
    motion = torch.eye(4, dtype=torch.float64).repeat(len(t), 1, 1)
    if name == "dolly":
        motion[:, 2, 3] = t * numbers["forward"] * depth
        return anchor @ motion
    if name == "orbit":
        angle = -t * math.radians(numbers["deg"])
        turn = se3.so3_exp(angle[:, None] * torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    else:
        round_about = 2 * math.pi * numbers["turns"] * t
        reach = math.radians(numbers["deg"]) * torch.sin(math.pi * t)
        turn = se3.so3_exp(torch.stack([reach * round_about.sin(), -reach * round_about.cos(), torch.zeros_like(t)], dim=-1))
    pivot = torch.tensor([0.0, 0.0, depth], dtype=torch.float64)
    motion[:, :3, :3] = turn
    motion[:, :3, 3] = pivot - turn @ pivot
    return anchor @ motion


def _viewcrafter(trajectory: Trajectory, anchor: Tensor, depth: float, focal: float, frames: int) -> Tensor:
    """ViewCrafter's paths live in a frame at the centre depth of the anchor photo."""
    elevation = trajectory.numbers.get("elevation", vc.ELEVATION_DEG)
    in_object, _ = vc.in_object_frame(anchor[None], anchor.new_zeros(1, 3), 0, depth, elevation)
    world_from_object = anchor @ torch.linalg.inv(in_object[0])
    if trajectory.name == "txt":
        assert trajectory.file is not None
        path = vc.text_path(in_object, *read_text_path(trajectory.file), frames)
    else:
        n = trajectory.numbers
        shift = (n["x"] * depth / focal, n["y"] * depth / focal)
        path = vc.specified_path(in_object, n["theta"], n["phi"], n["r"], *shift, frames)
    return world_from_object @ path


def read_text_path(file: Path) -> tuple[list[float], list[float], list[float]]:
    """The phi, theta (degrees) and r (fractions of the centre depth) lists of a ViewCrafter trajectory file, one per line."""
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as text ({error}); give a file with the lists phi, theta and r") from None
    if len(lines) != 3:
        raise UserError(f"{file} must have three lines (phi, theta, r), not {len(lines)}")
    lists = [[_finite(v, f"each value in {file}") for v in line.replace(",", " ").split()] for line in lines]
    if any(len(values) < 2 for values in lists):
        raise UserError(f"each line of {file} (phi, theta, r) needs two numbers or more")
    if not any(v for values in lists for v in values):
        raise UserError(f"the path in {file} does not move; give it a value other than 0")
    return lists[0], lists[1], lists[2]


def path_names(trajectory: Trajectory) -> list[str]:
    """The file names that a ``cameras`` path lists for its frames.

    Raises:
        UserError: the file is damaged or has fewer cameras than asked for.
    """
    from fvgen.io.cameras import read_entries

    assert trajectory.file is not None
    names = [entry.name for entry in read_entries(trajectory.file)]
    first, last = int(trajectory.numbers.get("first", 0)), int(trajectory.numbers.get("last", len(names) - 1))
    if not first < last < len(names):
        raise UserError(
            f"{trajectory.file} has the cameras 0 to {len(names) - 1}, so that {first}-{last} is no path; "
            "give FIRST-LAST with FIRST below LAST"
        )
    return names[first : last + 1]


def _from_file(trajectory: Trajectory, image_size: tuple[int, int]) -> Cameras:
    from fvgen.io.cameras import read_cameras

    assert trajectory.file is not None
    return read_cameras(trajectory.file, path_names(trajectory), image_size)
