"""Models and renders to measure with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fvgen.kernels.point_rasterizer.cases import point_map_scene
from fvgen.models.bundle import ModelBundle, read_index
from fvgen.models.spec import COMPONENTS, ModelIndex
from fvgen.pipeline import BUNDLED, find_model
from fvgen.recipes.presets import PRESETS, get_preset
from fvgen.utils.errors import UserError

QUICK_FRAMES, QUICK_SIZE = 4, (64, 96)


@dataclass(frozen=True)
class BenchModel:
    """A model that is not loaded yet.

    Attributes:
        name: for the records.
        index: its sizes.
        weights: "trained" or "random weights".
        load: ``load(device)`` gives the bundle there, in float32 as the pipeline loads it.
        source: what a user gives as ``--model``.
    """

    name: str
    index: ModelIndex
    weights: str
    load: Callable[[str], ModelBundle]
    source: str = ""

    @property
    def tag(self) -> str:
        """Stands for the model in the names of figures: "512" for viewcrafter_512."""
        return self.name.removeprefix("viewcrafter_")


def find_bench_model(name: str, device: str) -> BenchModel:
    """A bundled model, a model directory, or a full-size preset with random weights.

    Raises:
        UserError: there is no such model, or a full-size preset without a GPU.
    """
    if name in PRESETS and name not in BUNDLED:
        if device == "cpu":
            raise UserError(f"the full-size preset {name} is measured on a GPU; use --model tiny without one")
        return random_model(name)
    return stored_model(name, find_model(name))


def stored_model(name: str, directory: str | os.PathLike[str]) -> BenchModel:
    """A model directory.

    Raises:
        UserError: it is none.
    """
    load = lambda device: ModelBundle.from_pretrained(directory, device=device)  # noqa: E731
    return BenchModel(Path(name).name, read_index(directory), "trained", load, name)


def random_model(preset: str) -> BenchModel:
    """A preset with random weights: as slow or fast as a trained one, but its frames mean nothing.

    Layers that begin as zeros (the last ones of blocks, biases) are filled with small normal numbers: a GPU that multiplies zeros
    needs less power, so it would run at higher clocks than with trained weights. There are no gradients.

    Raises:
        UserError: there is no such preset.
    """
    spec = get_preset(preset)

    def load(device: str) -> ModelBundle:
        with torch.device(device):  # billions of numbers are drawn faster where they are needed
            bundle = ModelBundle.random(spec).to(device)
        for name in COMPONENTS:
            fill_zeros(getattr(bundle, name).requires_grad_(False))
        return bundle

    return BenchModel(preset, spec.index, "random weights", load, preset)


@torch.no_grad()
def fill_zeros(module: nn.Module) -> None:
    """Replaces parameters that hold only zeros by small normal numbers, always the same."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim and not parameter.any():
            parameter.normal_(0, 0.02, generator=generator)


def clip_size(index: ModelIndex, quick: bool = False) -> tuple[int, int, int]:
    """Frames, height and width of the clips to measure with; small ones for ``quick``."""
    return (QUICK_FRAMES, *QUICK_SIZE) if quick else (index.frames, index.height, index.width)


def render_call(index: ModelIndex, device: str, batch: int = 1, quick: bool = False) -> Callable[[], Tensor]:
    """A call that renders ``[B, T, 3, H, W]`` in [0, 1]: two photos' points from the T cameras of each of B clips."""
    frames, height, width = clip_size(index, quick)
    args = point_map_scene(device, torch.float32, frames, height, width, 2, height, width)
    args = (*args[:7], index.compositor, *args[8:])

    def render() -> Tensor:
        clips = [torch.ops.fvgen.render_points(*args)[0].permute(0, 3, 1, 2) for _ in range(batch)]
        return torch.stack(clips)

    return render
