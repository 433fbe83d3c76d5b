"""The rules of the rasterizer: closed forms, a brute force over all (pixel, point) pairs, and the odd cases by name."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fvgen.kernels import point_rasterizer as pr
from fvgen.kernels._testing import assert_close, largest_error
from fvgen.kernels.point_rasterizer import cases, reference
from fvgen.render import render_points, render_scene
from fvgen.types import Cameras

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def brute_force(points, size, radius, k):
    """``(idx, zbuf, dists2)`` on the CPU by testing every point against every pixel."""
    points = points.detach().cpu()
    (views, count, _), (height, width) = points.shape, size
    xf, yf = reference.pixel_centers(width, height, points), reference.pixel_centers(height, width, points)
    r2 = torch.tensor(radius, dtype=points.dtype) ** 2
    idx = torch.full((views, height, width, k), -1, dtype=torch.int32)
    zbuf = torch.full(idx.shape, -1.0, dtype=points.dtype)
    dists2 = zbuf.clone()
    for v in range(views):
        x, y, z = points[v].unbind(-1)
        for r in range(height):
            for c in range(width):
                d2 = (xf[c] - x) ** 2 + (yf[r] - y) ** 2
                hits = [i for i in range(count) if z[i] >= 0 and z[i] < math.inf and d2[i] < r2]
                hits = sorted(hits, key=lambda i: (float(z[i]), i))[:k]
                for slot, i in enumerate(hits):
                    idx[v, r, c, slot], zbuf[v, r, c, slot], dists2[v, r, c, slot] = v * count + i, z[i], d2[i]
    return idx, zbuf, dists2


def at_pixel(row, col, size, depth=1.0, dx=0.0, dy=0.0):
    """NDC point ``(dx, dy)`` pixels right of and below the centre of a pixel."""
    height, width = size
    s = min(size) / 2
    return [(width / 2 - (col + 0.5 + dx)) / s, (height / 2 - (row + 0.5 + dy)) / s, depth]


def camera(size, focal=20.0, device="cpu", dtype=torch.float32):
    """Pose and intrinsics of one camera at the origin, principal point in the middle."""
    height, width = size
    k = torch.tensor([[[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]]], dtype=dtype, device=device)
    return torch.eye(4, dtype=dtype, device=device)[None], k


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("views", "count", "size", "radius", "k"),
    [
        (2, 70, (9, 13), 0.3, 4),
        (1, 90, (14, 6), 0.45, 10),
        (1, 80, (8, 8), 1.3, 64),
        (1, 40, (1, 9), 1.0, 3),
        (1, 50, (7, 1), 3.0, 7),
    ],
)
def test_fragments_equal_brute_force(device, dtype, views, count, size, radius, k):
    points = cases.cloud_ndc(views, count, *size, seed=1).to(dtype)
    points[:, ::5, 2] = points[:, ::5, 2].round()  # ties
    for actual, expected, name in zip(
        pr.rasterize_fragments(points.to(device), size, radius, k),
        brute_force(points, size, radius, k),
        ("idx", "zbuf", "dists2"),
        strict=True,
    ):
        assert_close(actual, expected, 0.0, name)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    count=st.integers(0, 20),
    k=st.integers(1, 5),
    radius=st.floats(0.01, 4.0),
)
def test_any_size_equals_brute_force(seed, size, count, k, radius):
    points = cases.cloud_ndc(1, count, *size, seed=seed).float()
    for actual, expected in zip(
        pr.rasterize_fragments(points, size, radius, k), brute_force(points, size, radius, k), strict=True
    ):
        assert torch.equal(actual, expected)


def test_points_are_processed_in_chunks_with_the_same_result(monkeypatch):
    points = cases.cloud_ndc(2, 300, 15, 22, seed=3).float()
    points[..., 2] = points[..., 2].round()
    expected = pr.rasterize_fragments(points, (15, 22), 0.4, 6)
    monkeypatch.setattr(reference, "_CHUNK", 2000)
    for a, b in zip(pr.rasterize_fragments(points, (15, 22), 0.4, 6), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_pixel_convention(device):
    """A point on the centre of pixel (row 2, col 5) of a wide image hits exactly that pixel at distance 0."""
    size = (8, 12)
    points = torch.tensor([[at_pixel(2, 5, size)]], device=device)
    idx, zbuf, dists2 = pr.rasterize_fragments(points, size, 0.2, 2)
    assert (idx[0, :, :, 0] >= 0).nonzero().tolist() == [[2, 5]]
    assert zbuf[0, 2, 5].tolist() == [1.0, -1.0]
    assert abs(dists2[0, 2, 5, 0].item()) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
def test_radius_is_exclusive(device):
    """Eight pixels per NDC unit: all coordinates are dyadic, the neighbours lie at distance exactly 0.125."""
    size = (16, 16)
    points = torch.tensor([[at_pixel(4, 4, size)]], device=device)
    assert (pr.rasterize_fragments(points, size, 0.125, 1)[0] >= 0).sum() == 1
    just_more = float(torch.nextafter(torch.tensor(0.125), torch.tensor(1.0)))
    assert (pr.rasterize_fragments(points, size, just_more, 1)[0] >= 0).sum() == 5


@pytest.mark.parametrize("device", DEVICES)
def test_equal_depths_keep_the_lowest_indices(device):
    size = (4, 4)
    points = torch.tensor([[at_pixel(1, 1, size, depth=2.0)] * 6 + [at_pixel(1, 1, size, depth=1.0)]], device=device)
    idx, _, _ = pr.rasterize_fragments(points, size, 0.1, 4)
    assert idx[0, 1, 1].tolist() == [6, 0, 1, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_border_pixels_are_hit_from_outside(device):
    size = (6, 6)
    points = torch.tensor([[at_pixel(-1, 3, size, dy=0.2), at_pixel(3, 6, size, dx=-0.2), at_pixel(-3, 3, size)]], device=device)
    idx, _, _ = pr.rasterize_fragments(points, size, 0.3, 1)  # 0.9 pixels
    assert idx[0, 0, 3].item() == 0
    assert idx[0, 3, 5].item() == 1
    assert (idx >= 0).sum() == 2


@pytest.mark.parametrize("device", DEVICES)
def test_points_that_never_hit(device):
    size = (4, 4)
    good = at_pixel(1, 1, size)
    nan, inf = math.nan, math.inf
    bad = [[*good[:2], -1.0], [*good[:2], nan], [*good[:2], inf], [nan, good[1], 1.0], [good[0], inf, 1.0], [-inf, nan, -inf]]
    points = torch.tensor([bad], device=device, requires_grad=True)
    idx, zbuf, dists2 = pr.rasterize_fragments(points, size, 5.0, 8)
    assert (idx == -1).all()
    (zbuf.sum() + dists2.sum()).backward()
    assert (points.grad == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_many_points_in_one_pixel(device):
    size = (5, 5)
    z = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) + 1
    points = torch.tensor(at_pixel(2, 2, size)).repeat(50_000, 1)
    points[:, 2] = z
    idx, zbuf, _ = pr.rasterize_fragments(points[None].to(device), size, 0.2, 64)
    order = z.sort(stable=True).indices[:64]
    assert torch.equal(idx[0, 2, 2].cpu().long(), order)
    assert torch.equal(zbuf[0, 2, 2].cpu(), z[order])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["alpha", "norm"])
def test_blending_closed_form(device, mode):
    """Two discs over a pixel: w = 1 - d^2 / r^2."""
    idx = torch.tensor([[[[0, 1, -1], [-1, -1, -1]]]], dtype=torch.int32, device=device)
    dists2 = torch.tensor([[[[0.25, 0.5, -1], [-1, -1, -1]]]], device=device)
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    background = torch.tensor([0.3, 0.4], device=device)
    image = pr.composite(idx, dists2, features, 1.0, mode, background)
    first, second = (0.75, 0.5 * 0.25) if mode == "alpha" else (0.6, 0.4)
    assert torch.allclose(image[0, 0, 0].cpu(), torch.tensor([first, second]))
    assert torch.equal(image[0, 0, 1], background)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("channels", range(1, 8))
@pytest.mark.parametrize("mode", ["alpha", "norm"])
def test_channels_are_independent(device, channels, mode):
    args = cases.RENDER[0].make(device, torch.float32)
    points, _, cams, h, w, r, k, *_ = args
    features = torch.rand(len(points), channels, generator=torch.Generator().manual_seed(1)).to(device)
    image, _ = pr.render(points, features, cams, (h, w), r, k, mode)
    for c in range(channels):
        single, _ = pr.render(points, features[:, c : c + 1].contiguous(), cams, (h, w), r, k, mode)
        assert_close(image[..., c : c + 1], single, 1e-6, f"channel {c}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["alpha", "norm"])
def test_fused_equals_the_separate_steps(device, mode):
    """Image and both gradients of the fused operator against projection by autograd, fragments, and compositing."""
    points, features, cams, h, w, r, k, *_ = next(c for c in cases.RENDER if c.name == "odd").make(device, torch.float32)
    upstream = torch.randn(len(cams), h, w, 3, generator=torch.Generator().manual_seed(2)).to(device)
    results = []
    for fused in (True, False):
        p, f = points.clone().requires_grad_(), features.clone().requires_grad_()
        if fused:
            image, _ = pr.render(p, f, cams, (h, w), r, k, mode)
        else:
            idx, _, dists2 = pr.rasterize_fragments(reference.project(p, cams), (h, w), r, k)
            image = pr.composite(idx, dists2, f, r, mode)
        results.append((image, *torch.autograd.grad(image, (p, f), upstream)))
    for name, a, b in zip(("image", "gradient of points", "gradient of features"), *results, strict=True):
        assert_close(a, b, 1e-5, name)


@pytest.mark.parametrize("device", DEVICES)
def test_world_gradients_are_never_nan(device):
    """Rows with depth 0, a depth whose inverse overflows, NaN or Inf get gradient 0; the others are not disturbed."""
    size = (10, 10)
    pose, k = camera(size, device=device)
    good = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * 0.3 + torch.tensor([0.0, 0, 2])
    bad = [[0, 0, 0], [1, 1, 0], [0, 0, -0.0], [0, 0, 1e-40], [math.nan, 0, 1], [0, math.inf, 1], [0, 0, math.inf], [0.1, 0, -2]]
    bad = torch.tensor(bad)
    grads = []
    for points in (good, torch.cat([bad, good])):
        points = points.to(device).requires_grad_()
        features = torch.linspace(0, 1, len(points) * 3, device=device).reshape(-1, 3)[-len(good) :]
        features = torch.cat([torch.ones(len(points) - len(good), 3, device=device), features])
        image = render_points(points, features, pose, k, size, radius=0.2, points_per_pixel=8)
        assert image.isfinite().all()
        grads.append(torch.autograd.grad(image.square().sum(), points)[0])
    assert (grads[1][: len(bad)] == 0).all()
    assert grads[1].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", ["alpha", "norm"])
def test_empty_cloud_gives_the_background(device, mode):
    size = (3, 5)
    pose, k = camera(size, device=device)
    points, features = torch.zeros(0, 3, device=device, requires_grad=True), torch.zeros(0, 4, device=device, requires_grad=True)
    image = render_points(points, features, pose, k, size, compositor=mode, background=[0.1, 0.2, 0.3])
    assert torch.equal(image.cpu(), torch.tensor([0.1, 0.2, 0.3, 1.0]).expand(1, 3, 5, 4))
    image.sum().backward()
    assert points.grad.shape == (0, 3)
    assert (render_points(points, features, pose, k, size, compositor=mode) == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_unprojected_pixels_return_to_their_centres(device):
    """FVGen's convention: a point map seen from its own camera gives the photo back; ViewCrafter's is half a pixel off."""
    size = height, width = (12, 20)
    pose, k = camera(size, focal=15.0, device=device)
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    points = torch.stack([(u - width / 2) / 15.0, (v - height / 2) / 15.0, torch.ones_like(u)], dim=-1).reshape(-1, 3) * 2.0
    photo = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(0))
    points, colours = points.to(device), photo.reshape(-1, 3).to(device)
    same = render_points(points, colours, pose, k, size, radius=0.1, compositor="alpha")  # 0.6 pixels
    assert_close(same[0].cpu(), photo, 1e-5, "photo")
    shifted = render_points(
        points, colours, pose, k, size, radius=0.15, points_per_pixel=4, compositor="norm", pixel_center="integer"
    )
    corners = (photo[:-1, :-1] + photo[:-1, 1:] + photo[1:, :-1] + photo[1:, 1:]) / 4  # each point touches four pixels equally
    assert_close(shifted[0, :-1, :-1].cpu(), corners, 1e-4, "half-pixel shift to the top left")


@pytest.mark.parametrize("device", DEVICES)
def test_every_view_has_its_own_camera(device):
    points, features, cams, h, w, r, k, *_ = cases.RENDER[0].make(device, torch.float32)
    both, depth = pr.render(points, features, cams, (h, w), r, k)
    for v in range(len(cams)):
        image, d = pr.render(points, features, cams[v : v + 1], (h, w), r, k)
        assert torch.equal(image[0], both[v])
        assert torch.equal(d[0], depth[v])
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("device", DEVICES)
def test_render_scene(device):
    size = (16, 16)
    pose, k = camera(size, device=device)
    points = torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, 2.0]], device=device)
    clip = render_scene(points, torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], device=device), Cameras(k, pose, size), radius=0.2)
    assert clip.rgb.shape == (1, 3, 16, 16)
    assert clip.depth.shape == clip.coverage.shape == (1, 16, 16)
    assert clip.coverage.dtype == torch.bool
    assert torch.equal(clip.coverage, clip.depth > 0)
    assert set(clip.depth.unique().tolist()) == {0.0, 2.0}
    assert clip.rgb[0, 1, 8, 8] > clip.rgb[0, 0, 8, 8] > 0


def test_pose_convention():
    """A camera moved to the right (+x of OpenCV) sees a point to the left."""
    size = (9, 9)
    pose, k = camera(size)
    pose[0, 0, 3] = 0.5
    image = render_points(torch.tensor([[0.0, 0.0, 5.0]]), torch.ones(1, 1), pose, k, size, radius=0.1)
    assert image[0, :, :, 0].nonzero().tolist() == [[4, 2]]


class TestErrors:
    size = (4, 4)

    def call(self, **change):
        pose, k = camera(self.size)
        args = {
            "points": torch.zeros(5, 3),
            "features": torch.zeros(5, 3),
            "world_from_cam": pose,
            "K": k,
            "image_size": self.size,
        }
        return render_points(**{**args, **change})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"points": torch.zeros(5, 2)}, r"points must have shape \[P, 3\]"),
            ({"points": torch.zeros(5, 3, dtype=torch.int32)}, "float32"),
            ({"features": torch.zeros(4, 3)}, r"features must have shape \[5, C\]"),
            ({"features": torch.zeros(5, 3, dtype=torch.float64)}, "features must be torch.float32"),
            ({"world_from_cam": torch.eye(4)}, r"world_from_cam must have shape \[V, 4, 4\]"),
            ({"K": torch.eye(3)}, r"K must have shape \[1, 3, 3\]"),
            ({"K": torch.full((1, 3, 3), math.nan)}, r"K has NaN or Inf in view\(s\) \[0\]"),
            ({"K": torch.ones(1, 3, 3)}, "fx, 0, cx"),
            ({"world_from_cam": torch.full((1, 4, 4), math.nan)}, r"world_from_cam has NaN or Inf in view\(s\) \[0\]"),
            ({"world_from_cam": 2 * torch.eye(4)[None]}, "rigid"),
            ({"compositor": "beta"}, "compositor"),
            ({"radius": 0.0}, "radius"),
            ({"radius": math.nan}, "radius"),
            ({"points_per_pixel": 0}, "points_per_pixel"),
            ({"image_size": (0, 4)}, "image_size"),
            ({"background": [0.1]}, r"background must have shape \[3\] or \[2\]"),
            ({"pixel_center": "corner"}, "pixel_center"),
            ({"world_from_cam": torch.zeros(0, 4, 4), "K": torch.zeros(0, 3, 3)}, "at least one view"),
        ],
    )
    def test_message_names_what_is_expected(self, change, message):
        with pytest.raises(ValueError, match=message):
            self.call(**change)

    def test_cameras_that_want_a_gradient(self):
        with pytest.raises(ValueError, match="detach"):
            self.call(world_from_cam=torch.eye(4)[None].requires_grad_())

    def test_fragments_shape(self):
        with pytest.raises(ValueError, match=r"\[V, P, 3\]"):
            pr.rasterize_fragments(torch.zeros(5, 3), (4, 4), 0.1, 1)

    def test_image_only_has_no_gradient(self):
        points, *rest = next(c for c in cases.RENDER if c.name == "image_only").make("cpu", torch.float32)
        image, _, _ = torch.ops.fvgen.render_points(points.requires_grad_(), *rest)
        with pytest.raises(RuntimeError, match="keep_fragments"):
            image.sum().backward()


@pytest.mark.gpu
def test_cuda_graph(monkeypatch):
    """The fast path neither synchronises nor allocates outside the graph's pool."""
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    points, features, cams, h, w, r, k, *_ = next(c for c in cases.RENDER if c.name == "odd").make("cuda", torch.float32)
    expected, _ = pr.render(points, features, cams, (h, w), r, k)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        image, _ = pr.render(points, features, cams, (h, w), r, k)
    image.zero_()
    graph.replay()
    assert torch.equal(image, expected)
    cams.copy_(cams.roll(1, 0))
    graph.replay()
    assert torch.equal(image, expected.roll(1, 0))


@pytest.mark.gpu
def test_reference_on_cuda_finds_the_same_fragments():
    points, h, w, r, k = next(c for c in cases.FRAGMENTS if c.name == "odd").make("cpu", torch.float32)
    for a, b in zip(
        reference.rasterize_fragments(points.cuda(), h, w, r, k), reference.rasterize_fragments(points, h, w, r, k), strict=True
    ):
        assert torch.equal(a.cpu(), b)


@pytest.mark.slow
def test_cpu_speed():
    """One view of 294 912 points at 288x512: two seconds on two cores, as CPU time so that other load does not count."""
    args = cases.point_map_scene("cpu", torch.float32, views=1, height=288, width=512, sources=2, rows=288, cols=512)
    pr.render(*args[:3], args[3:5], args[5], args[6])
    start = time.process_time()
    pr.render(*args[:3], args[3:5], args[5], args[6])
    assert time.process_time() - start < 4.0


def test_float32_stays_near_float64():
    args = next(c for c in cases.RENDER if c.name == "small").make("cpu", torch.float64)
    wide, _, _ = reference.render_points(*args)
    narrow, _, _ = reference.render_points(*(a.float() if torch.is_tensor(a) else a for a in args))
    assert largest_error(narrow, wide) < 1e-4
