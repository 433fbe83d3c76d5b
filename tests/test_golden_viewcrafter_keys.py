"""Every key of the reference checkpoint is used exactly once or ignored for a stated reason; counts agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fvgen.diffusion.schedule import NoiseSchedule, reference_buffers
from fvgen.models.clip import ClipTextTower, ClipVisionTower
from fvgen.models.image_projector import ImageProjector
from fvgen.models.key_map import KEY_MAPS, PREFIXES, component_keys, convert_keys, ignored_reason, reference_shapes
from fvgen.models.unet import VideoUNet
from fvgen.models.vae import make_vae
from fvgen.recipes.presets import PRESETS
from tests.models import reference

pytestmark = pytest.mark.golden
BUILDERS: dict[str, Any] = {
    "unet": VideoUNet,
    "vae": make_vae,
    "text_encoder": ClipTextTower,
    "image_encoder": ClipVisionTower,
    "image_projector": ImageProjector,
}


@pytest.fixture(scope="module", params=["512", "1024"])
def checkpoint(request: pytest.FixtureRequest) -> tuple[dict[str, tuple[int, ...]], dict[str, nn.Module], dict[str, Any]]:
    entry = reference.manifest(f"unet_keys_{request.param}")
    spec = PRESETS[f"viewcrafter_{request.param}"]()
    with torch.device("meta"):
        modules = {name: build(**getattr(spec, name)) for name, build in BUILDERS.items()}
    return {name: tuple(shape) for name, shape, _ in entry["keys"]}, modules, entry


def test_every_key_is_used_once_or_ignored_with_a_reason(checkpoint) -> None:
    shapes, modules, _ = checkpoint
    used: list[str] = []
    for name, module in modules.items():
        names = KEY_MAPS[name](module)
        state = {k: torch.empty(shapes[PREFIXES[name] + k], device="meta") for k in component_keys(shapes, name)}
        convert_keys(state, names, module)
        used += [PREFIXES[name] + theirs for theirs in names.values()]
    ignored = {key: ignored_reason(key) for key in shapes if ignored_reason(key)}
    assert len(used) == len(set(used))
    assert not set(used) & set(ignored)
    assert set(used) | set(ignored) == set(shapes)


def test_the_layout_is_the_references_exactly(checkpoint) -> None:
    shapes, modules, _ = checkpoint
    assert reference_shapes(modules) == shapes
    assert len(shapes) == 2520


def test_parameters_per_component(checkpoint) -> None:
    shapes, modules, entry = checkpoint
    for name, module in modules.items():
        prefix = PREFIXES[name]
        unused = sum(torch.Size(shape).numel() for key, shape in shapes.items() if key.startswith(prefix) and ignored_reason(key))
        expected = entry["parameters_per_component"][prefix.removesuffix(".model.").removesuffix(".")]
        assert sum(p.numel() for p in module.parameters()) + unused == expected, name


def test_schedule_buffers_have_the_checkpoints_shapes(checkpoint) -> None:
    shapes, _, entry = checkpoint
    buffers = reference_buffers(NoiseSchedule.create(0.7), 0.7)
    assert list(buffers) == entry["buffers_in_state_dict"]
    assert all(tuple(value.shape) == shapes[name] for name, value in buffers.items())
