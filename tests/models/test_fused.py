"""The network on fused operators against the same network in plain PyTorch: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fvgen.models import fused
from fvgen.models.unet import VideoUNet

SMALL: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": (1, 2),
    "layers_per_level": 1,
    "attention_resolutions": (1, 2),
    "head_channels": 16,
    "context_dim": 24,
    "norm_groups": 8,
    "text_tokens": 5,
    "image_tokens_per_frame": 2,
    "initial_temporal_heads": 2,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "relative_causal": {"relative_position": True, "causal": True, "temporal_length": 3},
    "learnable_scale": {"learnable_image_scale": True, "transformer_depth": 2},
    "no_temporal": {"temporal_convolution": False, "temporal_attention": False, "initial_temporal_heads": 0},
    "no_image": {"image_cross_attention": False},
}
FRAMES = 3


def _network(variant: str, dtype: torch.dtype, device: str = "cpu") -> VideoUNet:
    """With every parameter filled: layers that start as zeros would hide what is before them."""
    torch.manual_seed(0)
    unet = VideoUNet(**SMALL | VARIANTS[variant])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return unet.to(device, dtype)


def _inputs(dtype: torch.dtype, device: str = "cpu", image_tokens: int = 2 * FRAMES) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, 8, FRAMES, 4, 6, generator=random)
    context = torch.randn(2, 5 + image_tokens, 24, generator=random)
    return x.to(device, dtype), torch.tensor([999, 3], device=device), context.to(device, dtype)


def _run(unet: VideoUNet, inputs: tuple[Tensor, Tensor, Tensor], whole: bool = True) -> dict[str, Tensor]:
    """Output (of the trunk if not ``whole``) and the gradients of a fixed functional of it, by name."""
    x, t, context = (v.clone().requires_grad_(v.is_floating_point()) for v in inputs)
    unet.zero_grad()
    out = unet(x, t, context) if whole else unet.trunk(x, t, context)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    (out * weights).sum().backward()
    found = {"out": out.detach(), "x": x.grad, "context": context.grad}
    return found | {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("image_tokens", [2 * FRAMES, 3, 0])
def test_values_and_gradients_in_float64(variant, image_tokens, monkeypatch):
    unet, inputs = _network(variant, torch.float64), _inputs(torch.float64, image_tokens=image_tokens)
    plain = _run(unet, inputs)
    monkeypatch.setattr(fused, "applies", lambda _x: True)
    found = _run(unet, inputs)
    assert found.keys() == plain.keys()
    for name, expected in plain.items():
        if expected is None:
            assert found[name] is None, name
            continue
        torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max() + 1), msg=name)


def test_trunk_in_float64(monkeypatch):
    unet, inputs = _network("plain", torch.float64), _inputs(torch.float64)
    plain = _run(unet, inputs, whole=False)
    monkeypatch.setattr(fused, "applies", lambda _x: True)
    found = _run(unet, inputs, whole=False)
    assert found.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-8, atol=1e-8, msg=name)


def test_checkpointing(monkeypatch):
    """Checkpointed layers give the gradients of layers that keep their activations."""
    monkeypatch.setattr(fused, "applies", lambda _x: True)
    unet, inputs = _network("plain", torch.float64).train(), _inputs(torch.float64)
    plain = _run(unet, inputs)
    unet.enable_gradient_checkpointing()
    for name, expected in _run(unet, inputs).items():
        torch.testing.assert_close(plain[name], expected, rtol=1e-12, atol=1e-12, msg=name)


def test_where_it_applies(monkeypatch):
    assert not fused.applies(torch.zeros(1, dtype=torch.bfloat16))

    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

    assert fused.applies(OnGpu())
    monkeypatch.setenv("FVGEN_KERNELS", "reference")
    assert not fused.applies(OnGpu())


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["plain", "relative_causal", "learnable_scale"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_in_bfloat16_are_as_exact_as_pytorchs(variant, autocast, monkeypatch):
    """Norm of the difference from float64, over all gradients, at most 1.5 times that of plain PyTorch in bfloat16."""
    exact = _run(_network(variant, torch.float64), _inputs(torch.float64))
    dtype = torch.float32 if autocast else torch.bfloat16
    unet, inputs = _network(variant, dtype, "cuda"), _inputs(dtype, "cuda")

    def error(mode: str) -> dict[str, float]:
        monkeypatch.setenv("FVGEN_KERNELS", mode)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            found = _run(unet, inputs)
        values = {name: (v.double().cpu() - exact[name], exact[name]) for name, v in found.items()}
        out = values.pop("out")
        total = [torch.cat([pair[i].flatten() for pair in values.values()]).norm() for i in range(2)]
        return {"out": float(out[0].norm() / out[1].norm()), "gradients": float(total[0] / total[1])}

    plain, fast = error("reference"), error("strict")
    assert all(fast[name] <= 1.5 * plain[name] for name in plain), (fast, plain)
    assert all(fast[name] < 0.1 for name in fast), fast
