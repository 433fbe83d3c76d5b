"""The video UNet against the reference: outputs, the activation after every block, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fvgen.models.key_map import unet_key_map
from fvgen.models.unet import VideoUNet
from tests.models import reference
from tests.models.reference_models import tiny_unet

pytestmark = pytest.mark.golden
ATOL_ROW, GRAD_ROW = "`unet_tiny` outputs", "`unet_tiny` gradients"


@pytest.fixture(scope="module")
def unet(golden_device: str) -> VideoUNet:
    return tiny_unet()


def _inputs(case: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    values = reference.tensors("unet_tiny", f"{case}.input.")
    return values["x"], values["timesteps"], values["context"], values.get("fs")


@pytest.mark.parametrize("case", reference.cases("unet_tiny", ".output"))
def test_output(unet: VideoUNet, case: str) -> None:
    with torch.no_grad():
        output = unet(*_inputs(case))
    reference.assert_close(output, reference.tensors("unet_tiny", f"{case}.output")[""], reference.tolerances(ATOL_ROW)[0])


def _reference_outputs(unet: VideoUNet, names: list[str], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output of the last module to run of those whose weights all lie below a reference module's name."""
    key_map, found, handles = unet_key_map(unet), {}, []
    for path, module in unet.named_modules():
        theirs = [v for k, v in key_map.items() if k.startswith(path + ".")]
        for name in names:
            if theirs and all(key.startswith(name + ".") for key in theirs):
                handles.append(module.register_forward_hook(lambda _m, _i, out, name=name: found.__setitem__(name, out)))
    with torch.no_grad():
        unet(*inputs)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("case", reference.cases("unet_tiny", ".act.out"))
def test_activations(unet: VideoUNet, case: str) -> None:
    """In float64: inner activations reach 17, where the reference's own float32 rounding alone is 1.6e-5."""
    unet = copy.deepcopy(unet).double()
    expected = reference.tensors("unet_tiny", f"{case}.act.")
    x, timesteps, context, fps = (v.double() if v is not None and v.is_floating_point() else v for v in _inputs(case))
    assert x is not None
    found = _reference_outputs(unet, list(expected), (x, timesteps, context, fps))
    found["emb_per_frame"] = unet.embed(timesteps, fps).repeat_interleave(x.shape[2], dim=0)
    assert set(expected) <= set(found)
    for name, value in expected.items():
        actual = found[name]
        if value.ndim == 5:
            actual = actual.unflatten(0, (value.shape[0], -1)).transpose(1, 2)
        torch.testing.assert_close(
            actual, value.double(), rtol=0.0, atol=reference.tolerances(ATOL_ROW)[0], msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("case", reference.cases("unet_tiny", ".grad.cotangent"))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(unet: VideoUNet, case: str, checkpointing: bool) -> None:
    rtol, smallest = reference.tolerances(GRAD_ROW)
    expected = reference.tensors("unet_tiny", f"{case}.grad.")
    x, timesteps, context, fps = _inputs(case)
    x.requires_grad_()
    context.requires_grad_()
    unet.zero_grad()
    if checkpointing:
        unet.enable_gradient_checkpointing()
        unet.train()
        for module in unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
    try:
        (unet(x, timesteps, context, fps) * expected["cotangent"]).mean().backward()
    finally:
        unet.eval()
        unet.disable_gradient_checkpointing()
    for name, leaf in (("x", x), ("context", context)):
        assert leaf.grad is not None
        reference.assert_close(leaf.grad, expected[name], rtol * expected[name].abs().max().item())
    norms = reference.manifest("unet_tiny")[f"{case}_param_grad_l2"]
    ours = {theirs: name for name, theirs in unet_key_map(unet).items()}
    parameters = dict(unet.named_parameters())
    assert set(norms) == set(ours)
    for name, norm in norms.items():
        gradient = parameters[ours[name]].grad
        assert gradient is not None, name
        if norm > smallest:
            assert gradient.norm().item() == pytest.approx(norm, rel=rtol), name


def test_parameter_count(unet: VideoUNet) -> None:
    assert sum(p.numel() for p in unet.parameters()) == reference.manifest("unet_tiny")["n_params"]
