"""The point rasterizer: the named scenes and the sweeps on a GPU, small scenes on the CPU."""

from __future__ import annotations

import pytest

from benchmarks.conftest import Timed
from fvgen.bench.raster import Scene, calls_of, scenes

pytest.importorskip("pytest_benchmark")


def run(timed: Timed, scene: Scene, device: str, rounds: int) -> None:
    facts = {"views": scene.views, "points": scene.points, "image_size": list(scene.size), "points_per_pixel": scene.k}
    timed(calls_of(scene, device), device, rounds, **facts)


@pytest.mark.gpu
@pytest.mark.parametrize("scene", scenes(), ids=lambda s: s.name)
def test_scene(timed: Timed, scene: Scene) -> None:
    run(timed, scene, "cuda", rounds=20)


@pytest.mark.parametrize("scene", scenes(quick=True), ids=lambda s: s.name)
def test_small_scene_on_the_cpu(timed: Timed, scene: Scene) -> None:
    run(timed, scene, "cpu", rounds=3)
