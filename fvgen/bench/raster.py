"""The point rasterizer: named scenes, and sweeps over points, views, points per pixel and image size, forward and backward.

Times are CUDA events around one call as a user makes it, inputs in device memory, compilation and allocation before. Each call
works on another copy of the inputs, so that none finds the previous one's data in the L2 cache.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fvgen.bench.kernels import Say, reason
from fvgen.bench.timing import cold_copies, strict_kernels, time_calls
from fvgen.kernels.point_rasterizer.cases import point_map_scene

SUITE = "raster"


@dataclass(frozen=True)
class Scene:
    """A measurement: point maps of ``sources`` photos of ``rows`` x ``cols`` pixels seen from ``views`` cameras.

    Attributes:
        views, sources, rows, cols: as above.
        size: (H, W) of the images in pixels.
        k: points per pixel.
        backward: time the gradients instead of the image.
        label: part of the record's name; None makes one from the sizes.
    """

    views: int = 16
    sources: int = 2
    rows: int = 320
    cols: int = 512
    size: tuple[int, int] = (320, 512)
    k: int = 10
    backward: bool = False
    label: str | None = None

    @property
    def points(self) -> int:
        return self.sources * self.rows * self.cols

    @property
    def name(self) -> str:
        sizes = f"{self.views}x{self.points}_{self.size[0]}x{self.size[1]}_k{self.k}"
        return f"raster_{'backward_' if self.backward else ''}{self.label or sizes}_ms"

    def make(self, device: str) -> tuple:
        """Arguments of ``render_points``."""
        scene = point_map_scene(
            device, torch.float32, self.views, *self.size, self.sources, self.rows, self.cols, keep=self.backward
        )
        return (*scene[:6], self.k, *scene[7:])


BASE = Scene()
NAMED = (
    replace(BASE, label="16x327680_320x512"),
    Scene(views=25, rows=288, size=(288, 512), label="25x294912_288x512"),
    Scene(sources=7, rows=576, cols=1024, size=(576, 1024), label="16x4M_576x1024"),
    replace(BASE, backward=True, label="16x327680_320x512"),
)


def scenes(quick: bool = False) -> list[Scene]:
    """The named scenes and the sweeps around the first of them, forward and backward; ``quick``: five that a CPU can do."""
    if quick:
        small = Scene(views=2, rows=16, cols=24, size=(32, 48), k=4)
        more = [replace(small, sources=4), replace(small, views=4), replace(small, size=(48, 64)), replace(small, backward=True)]
        return [small, *more]
    sweeps = [replace(BASE, sources=n) for n in (1, 2, 4, 8, 16)]
    sweeps += [replace(BASE, views=n) for n in (1, 4, 8, 16, 32)]
    sweeps += [replace(BASE, k=n) for n in (1, 4, 10, 16, 32, 64)]
    sweeps += [replace(BASE, size=s) for s in ((160, 256), (320, 512), (576, 1024), (1080, 1920))]
    every = [*NAMED, *sweeps, *(replace(s, backward=True) for s in sweeps)]
    return list({scene.name: scene for scene in every}.values())  # the sweeps meet in one scene


def measure_raster(device: str, rounds: int = 60, quick: bool = False, say: Say = lambda _: None) -> Iterator[dict[str, Any]]:
    """One record per scene; a scene that fails is a record with the reason.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        rounds: readings per time.
        quick: a few small scenes.
        say: told what is measured next.
    """
    work = scenes(quick)
    for n, scene in enumerate(work, 1):
        say(f"[{n}/{len(work)}] {scene.name.removesuffix('_ms')}")
        with strict_kernels():
            record = measure_scene(scene, device, rounds)
        yield record
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def measure_scene(scene: Scene, device: str, rounds: int = 60) -> dict[str, Any]:
    """The record of one scene, with PyTorch3D's time in ``others`` where it is installed."""
    record: dict[str, Any] = {
        "name": scene.name,
        "suite": SUITE,
        "unit": "ms",
        "views": scene.views,
        "points": scene.points,
        "image_size": list(scene.size),
        "points_per_pixel": scene.k,
        "backward": scene.backward,
    }
    cuda = device.startswith("cuda")
    try:
        copies = cold_copies(scene.make(device), device, most=8)
        calls = _calls(scene, copies)
        start = _memory_now() if cuda else 0
        timing = time_calls(calls, device, rounds)
        extra = torch.cuda.max_memory_allocated() - start if cuda else None
        if not scene.backward:
            record["bytes"] = least_bytes(copies[0])
    except Exception as error:
        return {**record, "median_ms": None, "failed": reason(error)}
    others = {}
    if importlib.util.find_spec("pytorch3d") is not None:
        try:
            theirs = [_pytorch3d(args, scene.backward) for args in copies[:3]]
            others["pytorch3d"] = time_calls(theirs, device, rounds).fields()
        except Exception as error:
            others["pytorch3d"] = {"median_ms": None, "failed": reason(error)}
    facts = {"radius": copies[0][5], "copies": len(copies), "extra_memory_bytes": extra}
    return {**record, **timing.fields(), **facts, "others": others}


def calls_of(scene: Scene, device: str) -> list[Callable[[], Any]]:
    """Calls that draw the scene (or compute its gradients) from inputs of their own each, which together exceed the L2 cache."""
    return _calls(scene, cold_copies(scene.make(device), device, most=8))


def _calls(scene: Scene, copies: list[tuple]) -> list[Callable[[], Any]]:
    return [(_backward if scene.backward else _forward)(args) for args in copies]


def least_bytes(args: tuple) -> int:
    """What ``render_points`` of these arguments must move through device memory."""
    from fvgen.kernels.point_rasterizer.spec import RENDER

    assert RENDER.cost is not None
    return RENDER.cost(*args).bytes


def _memory_now() -> int:
    """Allocated bytes, from which on the peak is counted."""
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _forward(args: tuple) -> Callable[[], Any]:
    return lambda: torch.ops.fvgen.render_points(*args)


def _backward(args: tuple) -> Callable[[], Any]:
    points, features, cameras, height, width, radius, k, mode, background, _ = args
    image, depth, idx = torch.ops.fvgen.render_points(points, features, cameras, height, width, radius, k, mode, background, True)
    upstream = torch.randn_like(image), torch.randn_like(depth)
    return lambda: torch.ops.fvgen.render_points_backward(*upstream, points, features, cameras, idx, radius, mode)


def _pytorch3d(args: tuple, backward: bool) -> Callable[[], Any]:
    """The same image by PyTorch3D's functions, projection included."""
    from pytorch3d.renderer.compositing import alpha_composite
    from pytorch3d.renderer.points.rasterize_points import rasterize_points
    from pytorch3d.structures import Pointclouds

    from fvgen.kernels.point_rasterizer.reference import project

    points, features, cameras, height, width, radius, k, *_ = args
    points, features = (x.detach().clone().requires_grad_(backward) for x in (points, features))

    def render() -> Any:
        ndc = project(points, cameras)
        clouds = Pointclouds(points=list(ndc.unbind(0)), features=[features] * len(cameras))
        idx, _, dists2 = rasterize_points(clouds, (height, width), radius=radius, points_per_pixel=k)
        weights = (1 - dists2 / (radius * radius)).permute(0, 3, 1, 2)
        image = alpha_composite(idx.long().permute(0, 3, 1, 2), weights, clouds.features_packed().permute(1, 0))
        return image.permute(0, 2, 3, 1)

    if not backward:
        return render
    image = render()
    upstream = torch.randn_like(image)
    return lambda: torch.autograd.grad(image, (points, features), upstream, retain_graph=True)
