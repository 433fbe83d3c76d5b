from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fvgen.codec import Conditioner, LatentCodec, posterior
from fvgen.diffusion import seeded_noise
from fvgen.models.vae import make_vae
from fvgen.utils.errors import UserError


@pytest.fixture(scope="module")
def vae() -> Any:
    torch.manual_seed(0)
    return make_vae((16, 16), 1, latent_channels=4, norm_num_groups=8, scaling_factor=0.5).eval()


def test_chunks_do_not_matter(vae: Any) -> None:
    rgb = torch.rand(2, 3, 3, 8, 12)
    one, many = (LatentCodec(vae, chunk=n) for n in (1, 100))
    first, second = one.encode(rgb, seeded_noise(0)), many.encode(rgb, seeded_noise(0))
    assert first.shape == (2, 4, 3, 4, 6)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.decode(first), many.decode(first), rtol=0, atol=1e-5)


def test_scale_and_frame_order(vae: Any) -> None:
    rgb = torch.rand(3, 3, 8, 12)
    latents = LatentCodec(vae).encode(rgb)
    with torch.no_grad():
        mode = vae.encode(2 * rgb[2:] - 1).latent_dist.mode()
        shown = (vae.decode(mode).sample + 1) / 2
    torch.testing.assert_close(latents[:, :, 2], 0.5 * mode, rtol=0, atol=1e-5)
    codec = LatentCodec(vae)
    torch.testing.assert_close(codec.decode(latents, clamp=False)[:, 2], shown, rtol=0, atol=1e-5)
    assert codec.decode(latents * 1e3).max() <= 1


def test_posterior_noise() -> None:
    moments = torch.cat([torch.zeros(1, 2, 1, 1), torch.tensor([0.0, 100.0]).view(1, 2, 1, 1)], dim=1)
    sample = posterior(moments, torch.ones(1, 2, 1, 1)).flatten()
    assert sample.tolist() == pytest.approx([1.0, 2.718281828**10], rel=1e-5)


def test_indivisible_size(vae: Any) -> None:
    with pytest.raises(UserError, match="multiple of 2"):
        LatentCodec(vae).encode(torch.rand(1, 3, 9, 12))


def test_condition(vae: Any) -> None:
    images: list[Tensor] = []

    def tower(image: Tensor) -> Tensor:
        images.append(image)
        return image.mean(dim=(2, 3))[:, None].repeat(1, 5, 1)

    prompt, empty = torch.randn(2, 77, 3).unbind(0)
    conditioner = Conditioner(LatentCodec(vae), tower, lambda tokens: tokens + 1, prompt, empty, fps=12)
    clips = torch.rand(2, 3, 3, 8, 12)
    condition = conditioner(clips, guidance=True)
    assert condition.context.shape == (2, 82, 3)
    assert torch.equal(condition.context[1, :77], prompt)
    assert torch.equal(images[0], 2 * clips[:, 0] - 1)
    assert torch.equal(images[1], torch.zeros(1, 3, 8, 12))
    assert condition.uncond_context is not None
    assert torch.equal(condition.uncond_context[1, :77], empty)
    torch.testing.assert_close(condition.uncond_context[:, 77:], torch.ones(2, 5, 3))
    assert condition.fps.tolist() == [12, 12]
    assert conditioner(clips[0]).uncond_context is None
    photo = torch.rand(3, 8, 12)
    conditioner(clips[0], photo=photo)
    assert torch.equal(images[-1], 2 * photo[None] - 1)
