"""The rasterizer against PyTorch3D's outputs and gradients: every scene of the golden manifest.

From ``points_ndc`` the fragments must agree bit for bit, images and gradients to 1e-5 of the largest entry. From world points the
projection rounds differently; there, pixels near a discontinuity (a disc's rim, two points at nearly the same depth) are told
apart, and the rest must agree to the sensitivity of the weights.
"""

from __future__ import annotations

import json

import pytest
import torch

from fvgen.kernels import point_rasterizer as pr
from fvgen.kernels._testing import assert_close, assert_close_outside_band
from fvgen.kernels.point_rasterizer import reference
from fvgen.render import render_points
from tests import golden

GROUP = "rasterizer"
MODES = ("alpha", "norm")
pytestmark = pytest.mark.golden


def manifest() -> dict:
    if not golden.available(GROUP, "manifest.json"):
        return {}
    return json.loads((golden.root() / GROUP / "manifest.json").read_text())


SCENES = manifest()
NAMES = sorted(SCENES) or [pytest.param("manifest.json", marks=pytest.mark.skip(f"no golden group {GROUP!r}"))]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class GoldenScene:
    def __init__(self, name: str, device: str) -> None:
        from safetensors.torch import load_file

        info = SCENES[name]
        self.tensors = load_file(golden.path(GROUP, info["file"]), device=device)
        self.size = (info["H"], info["W"])
        self.radius, self.k = info["radius"], info["points_per_pixel"]
        self.rows = slice(*info["fragment_rows"]) if "fragment_rows" in info else None
        self.empty = info["P"] == 0
        # share of the pixels that may lie near a discontinuity: stored borderline decisions, and a little for depth order
        self.band_share = 0.06 + info["n_borderline_radius_1e-5"] / (info["V"] * info["H"] * info["W"])
        self.modes = [m for m in MODES if f"image_{m}" in self.tensors]
        self.background = None
        if info["background"] is not None:
            self.background = torch.tensor(info["background"], device=device)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def fragments(self, points_ndc: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return pr.rasterize_fragments(points_ndc, self.size, self.radius, self.k)

    def composite(self, idx: torch.Tensor, dists2: torch.Tensor, features: torch.Tensor, mode: str) -> torch.Tensor:
        return pr.composite(idx, dists2, features, self.radius, mode, self.background)


@pytest.fixture(autouse=True)
def _fast_path_on_gpu(monkeypatch):
    monkeypatch.setenv("FVGEN_KERNELS", "strict")


@pytest.fixture
def scene(name: str, device: str) -> GoldenScene:
    return GoldenScene(name, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_fragments_bit_for_bit(scene):
    found = scene.fragments(scene["points_ndc"])
    for tensor, key in zip(found, ("idx", "zbuf", "dists2"), strict=True):
        if scene.empty:  # stored without views
            assert (tensor == -1).all()
        elif scene.rows is not None:
            assert_close(tensor[:, scene.rows], scene[f"{key}_rows"], 0.0, key)
        else:
            assert_close(tensor, scene[key], 0.0, key)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_fragment_gradients(scene):
    if "grad_zbuf" not in scene:
        pytest.skip("this scene stores no upstream gradients for fragments")
    points = scene["points_ndc"].clone().requires_grad_()
    _, zbuf, dists2 = scene.fragments(points)
    (grad,) = torch.autograd.grad([zbuf, dists2], points, [scene["grad_zbuf"], scene["grad_dists2"]])
    assert_close(grad, scene["grad_points_ndc_fragments"], 1e-5, "gradient of points_ndc")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_images_and_gradients_from_ndc(scene):
    for mode in scene.modes:
        points = scene["points_ndc"].clone().requires_grad_()
        features = scene["features"].clone().requires_grad_()
        idx, _, dists2 = scene.fragments(points)
        image = scene.composite(idx, dists2, features, mode)
        if scene.empty:
            assert (image == 0).all()
            continue
        assert_close(image, scene[f"image_{mode}"], 1e-5, f"{mode} image")
        grad_points, grad_features = torch.autograd.grad(image, [points, features], scene["grad_image"].float())
        assert_close(grad_points, scene[f"grad_points_ndc_{mode}"], 1e-5, f"{mode} gradient of points_ndc")
        assert_close(grad_features, scene[f"grad_features_{mode}"], 1e-5, f"{mode} gradient of features")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_projection(scene):
    cameras = pr.pack_cameras(scene["c2w_opencv"], scene["K_opencv"], scene.size)
    found, expected = reference.project(scene["points_world"], cameras), scene["points_ndc"]
    good = expected.isfinite().all(-1) & (expected[..., :2].abs() < 10).all(-1)
    assert torch.equal(found.isfinite().all(-1) & (found[..., :2].abs() < 10).all(-1), good)
    if good.any():
        assert (found - expected)[good].abs().max() < 2e-6  # a few float32 roundings of coordinates up to 4


def near_discontinuity(scene: GoldenScene) -> torch.Tensor:
    """Pixels [V, H, W] whose image a rounding of the projection may change by more than its size."""
    ndc, (height, width) = scene["points_ndc"], scene.size
    shift = 2e-6 / scene.radius  # largest shift of a point in units of the radius
    outer = pr.rasterize_fragments(ndc, scene.size, scene.radius * (1 + 2 * shift), scene.k + 1)
    idx, zbuf, dists2 = outer
    w = torch.where(idx >= 0, 1 - dists2 / scene.radius**2, 1.0)
    rim = (w.abs() < 8 * shift).any(-1)
    gap = torch.where(idx[..., 1:] >= 0, zbuf[..., 1:] - zbuf[..., :-1], 1.0)
    exact_ties = gap == 0  # equal depths of a plane stay equal
    tie = ((gap < 4e-6) & ~exact_ties).any(-1)
    # the normalised image divides by the sum of the weights: faint pixels are as sensitive as a rim
    faint = (torch.where(idx >= 0, w, 0.0).sum(-1) < 100 * shift) & (idx[..., 0] >= 0)
    return (rim | tie | faint).view(-1, height, width)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_images_and_gradients_from_world_points(scene):
    for mode in scene.modes:
        points = scene["points_world"].clone().requires_grad_()
        features = scene["features"].clone().requires_grad_()
        poses, k = scene["c2w_opencv"], scene["K_opencv"]
        options = {"radius": scene.radius, "points_per_pixel": scene.k, "compositor": mode, "background": scene.background}
        image = render_points(points, features, poses, k, scene.size, **options)
        if scene.empty:
            assert (image == 0).all()
            continue
        tolerance = 1e-5 + 4e-6 / scene.radius
        band = near_discontinuity(scene)[..., None]
        expected = scene[f"image_{mode}"]
        assert_close_outside_band(
            image, expected, band, tolerance=tolerance, largest_share=scene.band_share, name=f"{mode} image"
        )

        # without the upstream gradient of the band, both sides see the same smooth function
        upstream = scene["grad_image"].float().masked_fill(band, 0.0)
        found = torch.autograd.grad(image, [points, features], upstream)
        ndc = scene["points_ndc"].clone().requires_grad_()
        stored = scene["features"].clone().requires_grad_()
        idx, _, dists2 = scene.fragments(ndc)
        grad_ndc, grad_features = torch.autograd.grad(scene.composite(idx, dists2, stored, mode), [ndc, stored], upstream)
        cameras = pr.pack_cameras(poses, k, scene.size)
        grad_points = reference.project_backward(grad_ndc, scene["points_world"], cameras)
        assert_close(found[0], grad_points, 20 * tolerance, f"{mode} gradient of points")
        assert_close(found[1], grad_features, 20 * tolerance, f"{mode} gradient of features")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_world_gradient_is_the_stored_one(scene):
    """The chain rule from NDC to the world, with the stored NDC gradient as input."""
    cameras = pr.pack_cameras(scene["c2w_opencv"], scene["K_opencv"], scene.size)
    for mode in scene.modes:
        if scene.empty:
            continue
        found = reference.project_backward(scene[f"grad_points_ndc_{mode}"], scene["points_world"], cameras)
        expected = scene[f"grad_points_world_{mode}"]
        good = expected.isfinite().all(-1)
        assert_close(found[good], expected[good], 1e-5, f"{mode} gradient of points_world")
        assert (found[~good] == 0).all(), "the original has NaN where nothing was hit; here it is 0"


@pytest.mark.parametrize("name", NAMES)
def test_integer_pixel_centres_repeat_viewcrafter(name):
    """The stored intrinsics count pixel centres as integers; the same camera in FVGen's convention has its principal point half a
    pixel further, and ``pixel_center="integer"`` gives the stored image from it."""
    scene = GoldenScene(name, "cpu")
    if scene.empty:
        pytest.skip("no points")
    k = scene["K_opencv"].clone()
    k[:, :2, 2] += 0.5
    options = {"radius": scene.radius, "points_per_pixel": scene.k, "background": scene.background}
    args = (scene["points_world"], scene["features"], scene["c2w_opencv"])
    image = render_points(*args, k, scene.size, pixel_center="integer", **options)
    tolerance = 1e-5 + 4e-6 / scene.radius
    band = near_discontinuity(scene)[..., None]
    assert_close_outside_band(
        image, scene["image_alpha"], band, tolerance=tolerance, largest_share=scene.band_share, name="image"
    )
    assert not torch.equal(image, render_points(*args, k, scene.size, **options)) or not (scene["image_alpha"] != 0).any()
