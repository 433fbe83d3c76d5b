"""The packed VAE against the network it was made from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fvgen
from fvgen.inference import vae as packed_vae
from fvgen.inference.vae import PackedVAE
from fvgen.models.bundle import ModelBundle
from fvgen.models.vae import make_vae
from tests.models import reference

SIZES = ((24, 40), (40, 24), (8, 8))  # odd multiples of the reduction factor
BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}


def make(seed: int = 0, **given: Any) -> Any:
    """A small VAE in which every parameter matters: norms and biases are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = make_vae(**{"block_out_channels": (8, 16, 16, 24), "norm_num_groups": 4, **given}).eval()
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 1:
                parameter.data.normal_(0, 0.5).add_("norm" in name and name.endswith("weight"))
    return vae


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def operators(call: Callable[[], Any]) -> list[str]:
    """Names of the operators called, without views and allocations."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not any(returned.alias_info and not returned.alias_info.is_write for returned in function._schema.returns):
                names.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Count(), torch.no_grad():
        call()
    return [name for name in names if name not in ("_unsafe_view", "new_empty")]


@torch.no_grad()
def moments(vae: Any, pixels: Tensor) -> Tensor:
    return vae.encode(pixels).latent_dist.parameters


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    return vae.decode(latents).sample


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layers", [1, 2])
def test_encode(size: tuple[int, int], layers: int, dtype: torch.dtype) -> None:
    vae = make(layers_per_block=layers).to(dtype)
    pixels = draw(3, 3, *size, dtype=dtype)
    found = PackedVAE(vae, dtype).encode(pixels)
    assert found.is_contiguous()
    assert found.dtype == dtype
    assert error(found, moments(vae, pixels)) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layers", [1, 2])
def test_decode(size: tuple[int, int], layers: int, dtype: torch.dtype) -> None:
    vae = make(layers_per_block=layers).to(dtype)
    latents = draw(3, 4, size[0] // 8, size[1] // 8, dtype=dtype)
    found = PackedVAE(vae, dtype).decode(latents)
    assert found.is_contiguous()
    assert found.shape == (3, 3, *size)
    assert error(found, decoded(vae, latents)) < BOUND[dtype]


@pytest.mark.parametrize(
    "given",
    [
        {"block_out_channels": (8, 12), "latent_channels": 7},  # one more channel, of ones, fills the multiple of 8
        {"block_out_channels": (8,), "latent_channels": 8},
        {"block_out_channels": (9, 6), "norm_num_groups": 3},  # rows that are no multiple of 16 bytes
    ],
    ids=["two_levels", "one_level", "narrow"],
)
def test_other_structures(given: dict[str, Any]) -> None:
    vae = make(**given)
    pixels = draw(2, 3, 6, 10, dtype=torch.float32)
    engine = PackedVAE(vae, torch.float32)
    expected = moments(vae, pixels)
    latents = expected[:, : vae.config.latent_channels]
    assert error(engine.encode(pixels), expected) < 1e-5
    assert error(engine.decode(latents), decoded(vae, latents)) < 1e-5


@pytest.mark.parametrize("switch", ["use_quant_conv", "use_post_quant_conv", "mid_block_add_attention"])
def test_optional_parts(switch: str) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_config({**make().config, switch: False}).eval().double()
    pixels, engine = draw(1, 3, 16, 24), PackedVAE(vae, torch.float64)
    latents = moments(vae, pixels)[:, :4]
    assert error(engine.encode(pixels), moments(vae, pixels)) < 1e-10
    assert error(engine.decode(latents), decoded(vae, latents)) < 1e-10


@pytest.mark.parametrize("chunk", [1, 2, 5, None])
def test_result_does_not_depend_on_the_chunk(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = make().double()
    pixels, latents = draw(5, 3, 16, 24), draw(5, 4, 2, 3)
    monkeypatch.setattr(packed_vae, "LOGITS", 80)  # two frames of 2 x 3 tokens
    monkeypatch.setattr(packed_vae, "INDEXABLE", 2 * 18 * 26 * 16)  # two frames
    engine = PackedVAE(vae, torch.float64, chunk=chunk)
    assert error(engine.encode(pixels), moments(vae, pixels)) < 1e-10
    assert error(engine.decode(latents), decoded(vae, latents)) < 1e-10


def test_half_precision_stays_close() -> None:
    vae = make()
    pixels, engine = draw(2, 3, 24, 40, dtype=torch.float32), PackedVAE(vae, torch.bfloat16)
    expected = moments(vae, pixels)
    latents = expected[:, :4]
    image = decoded(vae, latents)
    found, painted = engine.encode(pixels), engine.decode(latents)
    assert found.dtype == painted.dtype == torch.float32
    plain = vae.to(torch.bfloat16)
    assert error(found, expected) < 1.2 * error(moments(plain, pixels.bfloat16()), expected)
    assert error(painted, image) < 1.2 * error(decoded(plain, latents.bfloat16()), image)


@torch.inference_mode()
def test_runs_in_inference_mode_and_takes_any_layout() -> None:
    vae = make()
    pixels = draw(2, 16, 24, 3, dtype=torch.float32).permute(0, 3, 1, 2)
    kept = pixels.clone()
    engine = PackedVAE(vae, torch.float32)
    assert error(engine.encode(pixels), moments(vae, pixels.contiguous())) < 1e-5
    torch.testing.assert_close(pixels, kept, rtol=0, atol=0)
    latents = draw(2, 4, 2, 3, dtype=torch.float32)
    torch.testing.assert_close(engine.decode(latents), engine.decode(latents), rtol=0, atol=0)


def test_operators() -> None:
    """Nothing converts a layout or copies: what changes the size is padded in the pass that takes the sum."""
    engine = PackedVAE(make(block_out_channels=(8, 16), layers_per_block=2), torch.float32)
    attention = {"addmm": 1, "bmm": 1, "row_softmax": 1, "baddbmm_": 1}
    resample, shortcut = {"padded_sum": 1, "convolution": 1}, {"addmm_": 1}
    pixels, latents = draw(2, 3, 12, 20, dtype=torch.float32), draw(2, 4, 6, 10, dtype=torch.float32)

    common = Counter(conv_from_image=1, conv_to_image=1) + Counter(attention) + Counter(resample) + Counter(shortcut)
    blocks = Counter(convolution=2 * 6, group_norm_silu=2 * 6 + 2)
    assert Counter(operators(partial(engine.encode, pixels))) == common + blocks
    blocks = Counter(convolution=2 * 8, group_norm_silu=2 * 8 + 2, ones_like=1, cat=1)
    assert Counter(operators(partial(engine.decode, latents))) == common + blocks


def test_every_parameter_is_used() -> None:
    """All but the bias of the keys, which cancels in the softmax of a single head."""
    vae = make(block_out_channels=(8, 16), layers_per_block=1).double()
    pixels, latents = draw(1, 3, 6, 8), draw(1, 4, 3, 4)

    def results() -> Tensor:
        engine = PackedVAE(vae, torch.float64)
        return torch.cat([engine.encode(pixels).flatten(), engine.decode(latents).flatten()])

    before, unused = results(), set()
    for name, parameter in vae.named_parameters():
        kept = parameter.data.clone()
        parameter.data += draw(*kept.shape)
        if error(results(), before) < 1e-6:
            unused.add(name)
        parameter.data = kept
    assert unused == {f"{half}.mid_block.attentions.0.to_k.bias" for half in ("encoder", "decoder")}


@pytest.mark.parametrize("dtype", BOUND)
def test_the_network_is_left_alone(dtype: torch.dtype) -> None:
    vae = make().to(dtype, memory_format=torch.channels_last)
    kept = {name: value.clone() for name, value in vae.state_dict().items()}
    engine = PackedVAE(vae, dtype)
    latents = draw(1, 4, 2, 3, dtype=dtype)
    before = engine.decode(latents)
    for name, value in vae.state_dict().items():
        torch.testing.assert_close(value, kept[name], rtol=0, atol=0)
    for parameter in vae.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(engine.decode(latents), before, rtol=0, atol=0)


def test_what_is_not_covered_is_refused() -> None:
    from diffusers import AutoencoderKL

    relu = AutoencoderKL(act_fn="relu", block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ValueError, match="relu"):
        PackedVAE(relu, torch.float32)


def test_bundled_model() -> None:
    vae = ModelBundle.from_pretrained(Path(fvgen.__file__).parent / "assets" / "tiny").vae.double()
    engine = PackedVAE(vae, torch.float64)
    pixels = draw(2, 3, 40, 56).tanh()
    expected = moments(vae, pixels)
    latents = expected[:, : vae.config.latent_channels]
    assert error(engine.encode(pixels), expected) < 1e-10
    assert error(engine.decode(latents), decoded(vae, latents)) < 1e-10


def recorded(call: Callable[[], Tensor]) -> Tensor:
    """Result of a CUDA graph of the call, which has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    out.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    return out


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    vae = make(block_out_channels=(32, 64, 64), norm_num_groups=8)
    pixels = draw(3, 3, 40, 56, dtype=torch.float32).tanh()
    expected = moments(vae, pixels)
    latents = expected[:, :4]
    image = decoded(vae, latents)
    engine = PackedVAE(vae.cuda(), torch.bfloat16)
    for run, given, result in ((engine.encode, pixels, expected), (engine.decode, latents, image)):
        call = partial(run, given.cuda())
        found = call()
        assert error(found.cpu(), result) < 0.05
        assert "clone" not in operators(call)
        assert error(recorded(call), found) < 0.01


@pytest.mark.golden
def test_reference() -> None:
    from tests.models.reference_models import tiny_vae

    engine = PackedVAE(tiny_vae(), torch.float32)
    inputs, outputs = (reference.tensors("vae_tiny", prefix) for prefix in ("input.", "output."))
    tolerance = reference.tolerances("`vae_tiny`")[0]
    reference.assert_close(engine.encode(inputs["image"]), outputs["moments"], tolerance)
    reference.assert_close(engine.decode(inputs["z"]), outputs["decoded"], tolerance)
