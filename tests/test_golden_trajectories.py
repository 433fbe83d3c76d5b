"""Camera paths against the reference's own numbers. Cases come from the file; a kind without a check here fails."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fvgen.geometry import viewcrafter_paths as vc
from fvgen.geometry.conventions import pytorch3d_from_opencv
from tests import golden

pytestmark = pytest.mark.golden
FILE = ("viewcrafter", "trajectories.json")
TOLERANCE = 1e-5
Case = dict[str, Any]


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(got: torch.Tensor, want: Any) -> None:
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=TOLERANCE, atol=TOLERANCE)


def same_cameras(poses: torch.Tensor, case: Case) -> None:
    camera = case["camera"]
    R, T = pytorch3d_from_opencv(poses)
    assert len(poses) == case["n"]
    assert str(R.dtype) == camera["R_dtype"]
    assert camera["in_ndc"] is False
    close(R, camera["R"])
    close(T, camera["T"])


def world_point_to_kth(case: Case, _data: Case) -> None:
    poses, points = vc.in_frame_of_pose(tensor(case["poses"]), tensor(case["points"]), case["k"])
    close(poses, case["out_poses"])
    close(points, case["out_points"])


def world_point_to_obj(case: Case, _data: Case) -> None:
    poses, points = vc.in_object_frame(tensor(case["poses"]), tensor(case["points"]), case["k"], case["r"], case["elevation"])
    close(poses, case["out_poses"])
    close(points, case["out_points"])


def anchor(case: Case, _data: Case) -> None:
    _, points = vc.in_object_frame(torch.eye(4)[None], torch.zeros(1, 3), 0, case["r"], case["elevation"])
    poses, _ = vc.in_object_frame(torch.eye(4)[None], torch.zeros(1, 3), 0, case["r"], case["elevation"])
    close(poses, case["c2w"])
    close(points[0], [row[3] for row in case["c2w"][0][:3]])


def sphere2pose(case: Case, _data: Case) -> None:
    close(vc.on_sphere(tensor(case["c2w"]), *(case[k] for k in ("theta", "phi", "r", "x", "y"))), case["out"])


def generate_traj_specified(case: Case, _data: Case) -> None:
    arguments = (case[k] for k in ("theta", "phi", "d_r", "d_x", "d_y", "frames"))
    same_cameras(vc.specified_path(tensor(case["c2w"]), *arguments), case)


def generate_traj_txt(case: Case, _data: Case) -> None:
    same_cameras(vc.text_path(tensor(case["c2w"]), *(case[k] for k in ("phi", "theta", "r", "frames"))), case)


def txt_interpolation(case: Case, _data: Case) -> None:
    close(vc.resample_list(case["input"], case["n"], case["mode"]), case["out"])


def interp_traj(case: Case, _data: Case) -> None:
    poses = vc.interpolated_poses(tensor(case["c2ws"]), case["n_inserts"])
    assert len(poses) == case["n"]
    assert str(poses.dtype) == case["out_dtype"]
    close(poses, case["out"])


def interpolate_sequence(case: Case, _data: Case) -> None:
    close(vc.interpolated_sequence(tensor(case["sequence"]), case["k"]), case["out"])


def generate_traj_interp(case: Case, _data: Case) -> None:
    inputs = (tensor(case[k]) for k in ("c2ws", "focals", "principal_points"))
    poses, focals, centres = vc.interpolated_path(*inputs, case["ns"])
    same_cameras(poses, case)
    close(focals, case["camera"]["focal_length"])
    close(centres, case["camera"]["principal_point"])


def generate_traj(case: Case, _data: Case) -> None:
    same_cameras(tensor(case["c2ws"]), case)


def generate_camera_path(case: Case, _data: Case) -> None:
    close(vc.focus_path(tensor(case["c2ws"]), case["n_inserts"]), case["out"])


def focus_point(case: Case, _data: Case) -> None:
    close(vc.focus_point(tensor(case["c2ws"])), case["out"])


def generate_candidate_poses(case: Case, data: Case) -> None:
    for count, out in case["poses_with_radius_offset_0_theta10_phi20"].items():
        close(vc.candidate_poses(tensor(data["anchor"]["c2w"]), int(count), 10.0, 20.0), [pose[0] for pose in out])


def rasterization(case: Case, _data: Case) -> None:
    assert list(vc.RASTER_SIZE) == case["image_size"]
    assert case["radius"] == vc.RASTER_RADIUS
    assert case["points_per_pixel"] == vc.RASTER_POINTS_PER_PIXEL


CHECKS: dict[str, Callable[[Case, Case], None]] = {
    name: f for name, f in list(globals().items()) if inspect.isfunction(f) and name not in ("tensor", "close", "same_cameras")
}


def _cases() -> list[Any]:
    if not golden.available(*FILE):
        return [pytest.param(None, None, id="no golden file")]
    data = json.loads((golden.root() / FILE[0] / FILE[1]).read_text())
    kinds = [k for k in data if k != "conventions"]
    listed = [(k, c) for k in kinds for c in (data[k] if isinstance(data[k], list) else [data[k]])]
    return [pytest.param(kind, case, id=f"{kind}-{i}") for i, (kind, case) in enumerate(listed)]


@pytest.mark.parametrize(("kind", "case"), _cases())
def test_trajectory(kind: str | None, case: Case | None) -> None:
    data = json.loads(golden.path(*FILE).read_text())
    assert kind in CHECKS, f"trajectories.json has a new kind of case: {kind}"
    assert case is not None
    CHECKS[kind](case, data)
