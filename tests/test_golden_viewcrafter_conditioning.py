"""Renders to frames, end to end with stub towers, against the reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvgen.codec import Conditioner, LatentCodec
from fvgen.diffusion import NoiseSchedule, ddim_sample, recorded_noise, unet_predictor
from fvgen.models.unet import VideoUNet
from tests.models import reference
from tests.models.reference_models import image_projector, tiny_unet, tiny_vae

pytestmark = pytest.mark.golden
FILE = "conditioning"
SPACINGS = {"uniform_trailing": "trailing"}


@pytest.fixture(scope="module")
def networks(golden_device: str) -> tuple[VideoUNet, nn.Module, nn.Module]:
    return tiny_unet(), tiny_vae(), image_projector(FILE, "image_proj_model.", "resampler_config")


@pytest.mark.parametrize("run", reference.keys_of(FILE, "runs"))
def test_end_to_end(networks: tuple[VideoUNet, nn.Module, nn.Module], run: str) -> None:
    unet, vae, projector = networks
    manifest, stub, values = reference.manifest(FILE), reference.tensors(FILE, "stub."), reference.tensors(FILE, f"{run}.")
    entry, (atol, final_atol) = manifest["runs"][run], reference.tolerances("`conditioning`")
    seen: list[Tensor] = []

    def stub_tower(image: Tensor) -> Tensor:
        tokens = F.avg_pool2d(image, 8).flatten(2).transpose(1, 2) @ stub["image.proj"] + stub["image.bias"]
        seen.append(tokens)
        return tokens

    codec = LatentCodec(vae, chunk=3, scaling_factor=manifest["scale_factor"])
    conditioner = Conditioner(codec, stub_tower, projector, stub["text.prompt"], stub["text.empty"], fps=entry["fs"][0])
    renders = values["input.renderings_thwc01"].permute(0, 3, 1, 2)
    reference.assert_close((2 * renders - 1).transpose(0, 1)[None], values["video_bcthw"], 1e-6)
    condition = conditioner(renders, recorded_noise(values["posterior_noise"][:, None]), guidance=True)
    reference.assert_close(seen[0], values["embedder_tokens"], atol)
    reference.assert_close(seen[1], values["embedder_tokens_uncond"], atol)
    reference.assert_close(condition.context, values["cond.c_crossattn"], atol)
    assert condition.uncond_context is not None
    reference.assert_close(condition.uncond_context, values["uc.c_crossattn"], atol)
    reference.assert_close(condition.latents, values["cond.c_concat"], atol)
    assert torch.equal(condition.fps, values["fs"])

    settings = entry["ddim"]
    latents = ddim_sample(
        unet_predictor(unet),
        NoiseSchedule.create(manifest["base_scale"]),
        condition,
        values["input.x_T"].shape,
        recorded_noise([values["input.x_T"], *values["step_noise"]]),
        steps=settings["S"],
        eta=settings["eta"],
        guidance_scale=settings["unconditional_guidance_scale"],
        guidance_rescale=settings["guidance_rescale"],
        spacing=SPACINGS.get(settings["timestep_spacing"], settings["timestep_spacing"]),
    )
    reference.assert_close(latents, values["latent_final"], final_atol)
    raw = 2 * codec.decode(latents, clamp=False) - 1
    reference.assert_close(raw.transpose(1, 2)[:, None], values["output_bnctHW"], final_atol)
    clamped = 2 * codec.decode(latents)[0] - 1
    reference.assert_close(clamped.permute(0, 2, 3, 1), values["output_clamped_thwc"], final_atol)
