"""The VAE against the reference: moments, posterior, decoding, activations around the middle blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fvgen.codec.latents import posterior
from fvgen.models.key_map import vae_key_map
from tests.models import reference
from tests.models.reference_models import tiny_vae

pytestmark = pytest.mark.golden
ROW = "`vae_tiny`"


@pytest.fixture(scope="module")
def vae(golden_device: str) -> nn.Module:
    return tiny_vae()


def _close(actual: Tensor, name: str) -> None:
    reference.assert_close(actual, reference.tensors("vae_tiny", name)[""], reference.tolerances(ROW)[0])


@torch.no_grad()
def test_encode(vae: nn.Module, golden_device: str) -> None:
    inputs = reference.tensors("vae_tiny", "input.")
    distribution = vae.encode(inputs["image"]).latent_dist
    _close(distribution.parameters, "output.moments")
    _close(distribution.mean, "output.mean")
    _close(distribution.logvar, "output.logvar")
    _close(distribution.std, "output.std")
    _close(posterior(distribution.parameters), "output.mode")
    _close(posterior(distribution.parameters, inputs["posterior_noise"]), "output.sample")
    # a sum of squares of the moments, which other kernels may round otherwise within their tolerance
    rtol = 1e-6 if golden_device == "cpu" else 1e-5
    torch.testing.assert_close(distribution.kl(), reference.tensors("vae_tiny", "output.kl")[""], rtol=rtol, atol=0)


@torch.no_grad()
def test_decode(vae: nn.Module) -> None:
    _close(vae.decode(reference.tensors("vae_tiny", "input.")["z"]).sample, "output.decoded")


def test_log_variance_is_clamped() -> None:
    values = reference.tensors("vae_tiny", "clamp.")
    noise = torch.ones_like(values["std"])
    std = posterior(values["parameters"], noise) - posterior(values["parameters"])
    torch.testing.assert_close(std, values["std"], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_activations(vae: nn.Module) -> None:
    expected, names, found = reference.tensors("vae_tiny", "act."), vae_key_map(vae), {}
    for path, module in vae.named_modules():
        theirs = [v for k, v in names.items() if k.startswith(path + ".")]
        for name in expected:
            stem = name.removesuffix(".in")
            if theirs and all(key.startswith(stem + ".") for key in theirs):

                def hook(_m: nn.Module, args: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
                    found[name] = args[0] if name.endswith(".in") else out

                module.register_forward_hook(hook)
    inputs = reference.tensors("vae_tiny", "input.")
    vae.encode(inputs["image"])
    vae.decode(inputs["z"])
    assert set(found) == set(expected)
    for name in expected:
        _close(found[name].reshape(expected[name].shape), f"act.{name}")
