"""The packed image tower and projector against the modules they were made from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fvgen
from fvgen.inference.towers import PackedImageTower, _Projector, _Tower
from fvgen.models.bundle import ModelBundle
from fvgen.models.clip import ClipVisionTower
from fvgen.models.image_projector import ImageProjector
from fvgen.models.key_map import PREFIXES, ignored_reason, image_encoder_key_map
from fvgen.models.reference_config import image_encoder_arguments
from tests.inference.test_vae import draw, error, operators, recorded
from tests.models import reference

BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}


def make(tower: dict[str, Any] | None = None, projector: dict[str, Any] | None = None) -> tuple[ClipVisionTower, ImageProjector]:
    """Small modules in which every parameter matters: norms and biases are random too."""
    sizes = {"image_size": 28, "patch_size": 7, "width": 24, "layers": 2, "heads": 3}
    inner = {"input_dim": 24, "output_dim": 20, "dim": 16, "depth": 3, "heads": 2, "head_dim": 6, "num_queries": 3, "frames": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        modules = ClipVisionTower(**{**sizes, **(tower or {})}).eval(), ImageProjector(**{**inner, **(projector or {})}).eval()
        for module in modules:
            for name, parameter in module.named_parameters():
                if parameter.ndim == 1:
                    parameter.data.normal_(0, 0.5).add_("norm" in name and name.endswith("weight"))
    return modules


@torch.no_grad()
def plain(modules: tuple[nn.Module, nn.Module], photo: Tensor) -> Tensor:
    tower, projector = modules
    return projector(tower(photo))


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "sizes",
    [
        ({}, {}),
        ({"image_size": 30}, {"frames": None, "depth": 1, "ff_mult": 2}),  # patches do not cover the image
        ({"layers": 0, "mlp_ratio": 2.0}, {"num_queries": 1}),
    ],
    ids=["usual", "remainder", "no_layers"],
)
def test_equals_the_modules(sizes: tuple[dict, dict], batch: int, dtype: torch.dtype) -> None:
    modules = tuple(module.to(dtype) for module in make(*sizes))
    photo = draw(batch, 3, 40, 56).tanh()
    found = PackedImageTower(*modules, dtype)(photo)
    assert found.dtype == dtype
    assert error(found, plain(modules, photo)) < BOUND[dtype]


def test_half_precision_stays_close() -> None:
    modules, photo = make(), draw(2, 3, 40, 56).tanh()
    found, expected = PackedImageTower(*modules, torch.bfloat16)(photo), plain(modules, photo)
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < 1.2 * error(plain(tuple(m.to(torch.bfloat16) for m in modules), photo), expected)


@torch.inference_mode()
def test_inference_mode() -> None:
    modules, photo = make(), draw(1, 3, 28, 28, dtype=torch.float32).tanh()
    engine = PackedImageTower(*modules, torch.float32)
    assert error(engine(photo), plain(modules, photo)) < 1e-5
    torch.testing.assert_close(engine(photo), engine(photo), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modules_are_left_alone_and_all_their_parameters_used(dtype: torch.dtype) -> None:
    """All but the tower's bias of the keys, which cancels in the softmax; only the other two thirds of ``to_qkv.bias`` show."""
    modules = tuple(module.to(dtype) for module in make({"layers": 1}, {"depth": 2}))
    photo = draw(1, 3, 28, 28).tanh()
    parameters = {f"{i}.{n}": p for i, module in enumerate(modules) for n, p in module.named_parameters()}
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    engine = PackedImageTower(*modules, dtype)
    before = engine(photo)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.data, kept[name], rtol=0, atol=0)
        parameter.data += draw(*parameter.shape, dtype=dtype)
        assert error(PackedImageTower(*modules, dtype)(photo), before) > 1e-3, name
        torch.testing.assert_close(engine(photo), before, rtol=0, atol=0)
        parameter.data = kept[name]


def test_bundled_model() -> None:
    bundle = ModelBundle.from_pretrained(Path(fvgen.__file__).parent / "assets" / "tiny")
    modules = bundle.image_encoder.double(), bundle.image_projector.double()
    photo = draw(1, 3, 64, 96).tanh()
    assert error(PackedImageTower(*modules, torch.float64)(photo), plain(modules, photo)) < 1e-10


def test_operators_per_layer() -> None:
    photo = draw(1, 3, 28, 28, dtype=torch.float32)
    calls = []
    for layers, depth in ((1, 1), (2, 1), (1, 2)):
        engine = PackedImageTower(*make({"layers": layers}, {"depth": depth}), torch.float32)
        engine(photo)  # fills caches
        calls.append(len(operators(partial(engine, photo))))
    assert [n - calls[0] for n in calls[1:]] == [8, 9]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    modules = make({"width": 48}, {"input_dim": 48, "dim": 32, "head_dim": 16})
    photo = draw(1, 3, 40, 56, dtype=torch.float32).tanh()
    expected = plain(modules, photo)
    call = partial(PackedImageTower(*(module.cuda() for module in modules), torch.bfloat16), photo.cuda())
    found = call()
    assert error(found.float().cpu(), expected) < 0.05
    assert error(recorded(call).float(), found.float()) < 0.01


@pytest.mark.golden
@pytest.mark.parametrize("name", reference.cases("resampler", ".output"))
@torch.no_grad()
def test_reference_projector(name: str) -> None:
    from tests.models.reference_models import image_projector

    projector = image_projector("resampler", f"{name}.weights.", f"{name}_config")
    values = reference.tensors("resampler", f"{name}.")
    found = _Projector(projector, torch.float32)(values["input"])
    reference.assert_close(found, values["output"], reference.tolerances("`resampler`")[0])


@pytest.mark.golden
@pytest.mark.parametrize("case", reference.cases("clip_tiny", ".output", "vision."))
@torch.no_grad()
def test_reference_tower(case: str) -> None:
    tower = ClipVisionTower(**image_encoder_arguments(reference.manifest("clip_tiny")["config"]["vision_cfg"]))
    weights = reference.tensors("clip_tiny", "vision.weights.model.")
    used = {k: v for k, v in weights.items() if ignored_reason(PREFIXES["image_encoder"] + k) is None}
    reference.load(tower, image_encoder_key_map(tower), used)
    values = reference.tensors("clip_tiny", f"{case}.")
    image = values["image_u8"].float() / 255 * 2 - 1 if "image_u8" in values else torch.zeros(1, 3, 224, 224)
    x, residual = _Tower(tower, torch.float32)(image)
    reference.assert_close(x + residual, values["output"], reference.tolerances("`clip_tiny`")[0])
