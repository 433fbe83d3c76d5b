"""The DDIM sampler with recorded noises, the single conversion functions and one training loss, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fvgen.diffusion import NoiseSchedule, add_noise, ddim_sample, eps_from_v, recorded_noise, unet_predictor, velocity, x0_from_v
from fvgen.diffusion.guidance import combine
from fvgen.models.unet import VideoUNet
from fvgen.types import Condition
from tests.models import reference
from tests.models.reference_models import tiny_unet

pytestmark = pytest.mark.golden
FILE = "ddim_tiny"
SPACINGS = {"uniform_trailing": "trailing"}


@pytest.fixture(scope="module")
def unet(golden_device: str) -> VideoUNet:
    return tiny_unet()


def _schedule() -> NoiseSchedule:
    entry = reference.manifest(FILE)
    return NoiseSchedule.create(entry["base_scale"], linear_start=entry["linear_start"], linear_end=entry["linear_end"])


def _row(steps: int) -> str:
    return "50 steps" if steps == 50 else "`ddim_tiny`, 5 or 4"


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("run", reference.keys_of(FILE, "runs"))
def test_run(unet: VideoUNet, run: str, batched: bool) -> None:
    entry = reference.manifest(FILE)["runs"][run]
    if batched and (entry["steps"] > 10 or entry["guidance_scale"] == 1):
        return
    values, expected = reference.tensors(FILE, "input."), reference.tensors(FILE, f"{run}.")
    condition = Condition(values["concat_latent"], values["context_cond"], values["context_uncond"], values["fs"])
    clean: list[Tensor] = []
    final = ddim_sample(
        unet_predictor(unet),
        _schedule(),
        condition,
        values["x_T"].shape,
        recorded_noise([values["x_T"], *expected.get("noise", [])]),
        steps=entry["steps"],
        eta=entry["eta"],
        guidance_scale=entry["guidance_scale"],
        guidance_rescale=entry["guidance_rescale"],
        spacing=SPACINGS.get(entry["timestep_spacing"], entry["timestep_spacing"]),
        batched_guidance=batched,
        callback=lambda _step, _total, x0: clean.append(x0),
    )
    atol = reference.tolerances(_row(entry["steps"]))[0]
    reference.assert_close(final, expected["final"], atol)
    if "pred_x0" in expected:
        # The reference records clean latents times the scale at the next time.
        times = [*expected["timesteps"].tolist(), 0]
        times = sorted(times, reverse=True)
        for i, x0 in enumerate(clean):
            reference.assert_close(x0.float() * float(_schedule().scale[times[i + 1]]), expected["pred_x0"][i], atol)


def test_no_nan_where_the_reference_has_one(unet: VideoUNet, golden_device: str) -> None:
    values = reference.tensors(FILE, "input.")
    condition = Condition(values["concat_latent"], values["context_cond"], values["context_uncond"], values["fs"])
    for steps, was_nan in reference.manifest(FILE)["reference_gives_nan_at_eta1_uniform_trailing"].items():
        if was_nan and int(steps) < 10:
            generator = torch.Generator().manual_seed(0)
            final = ddim_sample(
                unet_predictor(unet),
                _schedule(),
                condition,
                values["x_T"].shape,
                lambda shape, g=generator: torch.randn(tuple(shape), generator=g).to(golden_device),
                steps=int(steps),
            )
            assert final.isfinite().all()


def test_single_functions() -> None:
    f, plain = reference.tensors(FILE, "fn."), NoiseSchedule.create(base_scale=1.0)
    atol = reference.tolerances("single blocks")[0]
    x0, noise, t, v = f["x0"], f["noise"], f["t"], f["v"]
    reference.assert_close(add_noise(plain, x0, noise, t), f["q_sample"], atol)
    reference.assert_close(velocity(plain, x0, noise, t), f["get_v"], atol)
    reference.assert_close(eps_from_v(plain, x0, v, t), f["predict_eps_from_z_and_v"], atol)
    reference.assert_close(x0_from_v(plain, x0, v, t), f["predict_start_from_z_and_v"], atol)


@pytest.mark.parametrize("name", reference.cases(FILE, prefix="fn.rescale_noise_cfg_"))
def test_guidance_rescale(name: str) -> None:
    f = reference.tensors(FILE, "fn.")
    rescale = float(name.rsplit("_", 1)[1])
    # scale 3 from nothing: combine() then rescales 3 x0 towards the spread of its conditional prediction
    guided = combine(f["v"], (f["v"] * 2 - 3 * f["x0"]), 2.0, 0.0)
    reference.assert_close(guided, 3 * f["x0"], 1e-5)
    actual = combine(f["v"], f["v"] * 2 - 3 * f["x0"], 2.0, rescale)
    reference.assert_close(actual, f[name.removeprefix("fn.")], reference.tolerances("single blocks")[0])


@torch.no_grad()
def test_training_loss(unet: VideoUNet) -> None:
    train, values, schedule = reference.tensors(FILE, "train."), reference.tensors(FILE, "input."), _schedule()
    t, noise, clean = train["t"], train["noise"], values["concat_latent"]
    _, _, s = schedule.rates(t, clean)
    reference.assert_close(s * clean, train["x_start_rescaled"], 1e-6)
    condition = Condition(values["concat_latent"], values["context_cond"], None, values["fs"])
    v = unet_predictor(unet)(add_noise(schedule, clean, noise, t), t, condition)
    loss = (v - velocity(schedule, clean, noise, t)).square().mean()
    torch.testing.assert_close(loss, train["loss"][0], rtol=1e-5, atol=0)
