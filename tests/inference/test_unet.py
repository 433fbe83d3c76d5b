"""The packed network against the one it is made from, and against the reference values of the original."""

from __future__ import annotations

import pytest
import torch

from fvgen.inference.rows import Pending
from fvgen.inference.unet import UNetEngine
from fvgen.models.unet import VideoUNet
from tests.models import reference
from tests.models.reference_models import tiny_unet
from tests.models.test_unet import SMALL

VARIANTS = {
    "plain": {},
    "relative_causal": {"relative_position": True, "causal": True},
    "without_temporal": {"temporal_convolution": False, "temporal_attention": False, "initial_temporal_heads": 0},
    "two_blocks_and_learnable_scale": {"transformer_depth": 2, "learnable_image_scale": True},
    "without_fps_and_image": {"fps_condition": False, "image_cross_attention": False},
    "three_levels": {"channel_mult": (1, 2, 2), "attention_resolutions": (1, 2), "layers_per_level": 2},
}


def _network(**options) -> VideoUNet:
    torch.manual_seed(0)
    unet = VideoUNet(**{**SMALL, **options}).double().eval()
    with torch.no_grad():
        for parameter in unet.parameters():  # no branch may be zero
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return unet


def _inputs(batch: int, tokens: int, height: int = 4, width: int = 6) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, 3, height, width, generator=generator, dtype=torch.float64)
    context = torch.randn(batch, 77 + tokens, 12, generator=generator, dtype=torch.float64)
    return x, torch.tensor([3, 999])[:batch], context, torch.tensor([10, 24])[:batch]


def _predict(engine: UNetEngine, x, timesteps, context, fps) -> torch.Tensor:
    frames = x.shape[2]
    return engine(x, engine.shifts(timesteps, fps, frames), engine.keys(context, frames))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("tokens", [0, 48, 20])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_engine_computes_what_the_network_computes(options: dict, tokens: int, batch: int) -> None:
    unet = _network(**options)
    inputs = _inputs(batch, tokens, height=8, width=12)
    with torch.no_grad():
        expected = unet(*inputs)
    actual = _predict(UNetEngine(unet, torch.float64), *inputs)
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= 2e-7 * expected.abs().max()


def test_inputs_and_weights_are_left_alone() -> None:
    unet = _network()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    inputs = _inputs(2, 48)
    kept = [x.clone() for x in inputs]
    engine = UNetEngine(unet, torch.float64)
    shifts, keys = engine.shifts(inputs[1], inputs[3], 3), engine.keys(inputs[2], 3)
    first = engine(inputs[0], shifts, keys)
    assert torch.equal(first, engine(inputs[0], shifts, keys)), "a call changed what the next one reads"
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_every_weight_matters() -> None:
    """Each parameter of the network changes the engine's result: none was forgotten when the weights were packed."""
    unet = _network(learnable_image_scale=True, layers_per_level=0, channel_mult=(1,))
    inputs = _inputs(1, 48, height=2, width=2)
    expected = _predict(UNetEngine(unet, torch.float64), *inputs)
    deaf = []
    for name, parameter in unet.named_parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter.copy_(torch.randn_like(kept))
            moved = _predict(UNetEngine(unet, torch.float64), *inputs)
            parameter.copy_(kept)
        if torch.equal(moved, expected):
            deaf.append(name)
    assert deaf == []


def test_the_lower_resolutions_can_be_taken_from_an_earlier_call() -> None:
    unet = _network(channel_mult=(1, 2, 2), attention_resolutions=(1, 2))
    x, timesteps, context, fps = _inputs(1, 48, height=8, width=12)
    engine = UNetEngine(unet, torch.float64)
    shifts, keys = engine.shifts(timesteps, fps, 3), engine.keys(context, 3)
    expected, lower = engine.with_lower(x, shifts, keys)
    assert torch.equal(engine.with_lower(x, shifts, keys, lower)[0], expected)
    other = engine.with_lower(0.5 * x, shifts, keys, lower)[0]
    assert not torch.equal(other, expected), "the highest resolution must see the present input"
    assert not torch.allclose(other, engine(0.5 * x, shifts, keys)), "the lower ones must not"


@pytest.mark.parametrize("layers_per_level", [1, 2])
def test_all_but_the_last_layer_can_be_taken_from_an_earlier_call(layers_per_level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = _network(channel_mult=(1, 2, 2), attention_resolutions=(1, 2), layers_per_level=layers_per_level)
    x, timesteps, context, fps = _inputs(1, 48, height=8, width=12)
    engine = UNetEngine(unet, torch.float64)
    shifts, keys = engine.shifts(timesteps, fps, 3), engine.keys(context, 3)
    blocks: list[int] = []  # by their number in the order in which the network is packed
    run = UNetEngine._run
    monkeypatch.setattr(UNetEngine, "_run", staticmethod(lambda layer, *rest: (blocks.append(layer.shift), run(layer, *rest))[1]))

    most, last = engine.most_left_out, len(engine._shifts) - 1
    assert most == layers_per_level
    full, lower = engine.with_lower(x, shifts, keys, left_out=most)
    assert torch.equal(full, engine(x, shifts, keys)), "nothing is left out without earlier features"
    blocks.clear()
    assert torch.equal(engine.with_lower(x, shifts, keys, lower, most)[0], full)
    assert blocks == [last], "what runs is the last block on the way up, beside the input's convolution"
    other = engine.with_lower(0.5 * x, shifts, keys, lower, most)[0]
    assert not torch.equal(other, full), "the last layer must see the present input"
    assert not torch.allclose(other, engine(0.5 * x, shifts, keys)), "the others must not"


def test_a_pending_sum() -> None:
    x, residual, bias = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(4)
    kept = x.clone()
    for given in ((None, None), (residual, None), (None, bias), (residual, bias)):
        assert torch.allclose(Pending(x, *given).total(), x + sum(g for g in given if g is not None))
    assert torch.equal(x, kept)


def test_a_skip_connection_is_joined_by_the_norm() -> None:
    """Nothing is copied or added beside it: the decoder's blocks hand sum and skip connection over as they are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called: list[str] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    engine = UNetEngine(_network(), torch.float64)
    x, timesteps, context, fps = _inputs(1, 48)
    shifts, keys = engine.shifts(timesteps, fps, 3), engine.keys(context, 3)
    with Note():
        engine(x, shifts, keys)
    blocks = sum(len(level) for level in engine._up)
    assert sum("group_norm_silu_skip" in name for name in called) == blocks
    assert not [name for name in called if "aten.cat" in name]


@pytest.mark.golden
@pytest.mark.parametrize("case", reference.cases("unet_tiny", ".output"))
def test_golden(case: str) -> None:
    values = reference.tensors("unet_tiny", f"{case}.input.")
    fps = values.get("fs")
    fps = torch.full_like(values["timesteps"], tiny_unet().config.default_fps) if fps is None else fps
    actual = _predict(UNetEngine(tiny_unet(), torch.float32), values["x"], values["timesteps"], values["context"], fps)
    tolerance = reference.tolerances("`unet_tiny` outputs")[0]
    reference.assert_close(actual, reference.tensors("unet_tiny", f"{case}.output")[""], tolerance)
