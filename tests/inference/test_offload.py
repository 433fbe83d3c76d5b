"""Weights that visit the device: the same frames, and nothing is left there."""

from __future__ import annotations

import pytest
import torch

from fvgen.inference.clip import ClipEngine
from fvgen.inference.offload import on_device
from fvgen.inference.towers import PackedImageTower
from fvgen.models.bundle import ModelBundle
from fvgen.pipeline import BUNDLED, FVGenPipeline
from fvgen.recipes.presets import get_preset
from fvgen.sampling import ModelSampler
from fvgen.utils.device import lent


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    return ModelBundle.random(get_preset("tiny"))


def test_a_module_gets_its_own_tensors_back() -> None:
    module = torch.nn.BatchNorm1d(3)
    before = [t.data_ptr() for t in (*module.parameters(), *module.buffers())]
    with lent(module, "meta"):
        assert {t.device.type for t in (*module.parameters(), *module.buffers())} == {"meta"}
    assert [t.data_ptr() for t in (*module.parameters(), *module.buffers())] == before
    assert module.weight.requires_grad
    with pytest.raises(ValueError, match="inside"), lent(module, "meta"):
        raise ValueError("inside")
    assert module.weight.data_ptr() == before[0]


def test_a_packed_network_is_copied_whole(bundle: ModelBundle) -> None:
    """On the meta device nothing can be computed: every tensor that is used has to have moved, and none of the original."""
    packed = PackedImageTower(bundle.image_encoder, bundle.image_projector, torch.float32)
    photo = torch.rand(1, 3, 40, 64)
    expected = packed(photo)
    moved = on_device(packed, "meta")
    assert moved(photo.to("meta")).shape == expected.shape
    assert torch.equal(packed(photo), expected)
    assert torch.equal(on_device(packed, "cpu")(photo), expected)


def test_offloaded_frames_are_the_same(bundle: ModelBundle) -> None:
    renders = torch.rand(1, 6, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    whole, offloaded = ClipEngine(bundle, torch.float32), ModelSampler(bundle, offload="cpu")
    noise = offloaded.clip_noise(renders.shape, 2)
    frames = offloaded.decode(offloaded.few_step(offloaded.condition(renders), 2))
    assert frames.shape == renders.shape
    assert (frames - whole(renders, noise)).abs().max() <= 1e-5  # the VAE takes four frames at a time
    assert offloaded.graph(renders.shape, 2) is None
    guided = offloaded.condition(renders, guidance=True)
    assert offloaded.ddim(guided, 2, guidance_scale=2.0).isfinite().all()


@pytest.mark.gpu
def test_little_stays_on_the_gpu() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    whole, lean = (FVGenPipeline.from_pretrained(BUNDLED["tiny"], "cuda", cpu_offload=offload) for offload in (False, True))
    assert next(lean.bundle.vae.parameters()).device.type == "cpu"
    renders = torch.rand(1, 4, 3, 160, 256)
    samplers = ModelSampler(whole.bundle), ModelSampler(lean.bundle, offload="cuda")
    clips = [s.decode(s.few_step(s.condition(renders), 4)) for s in samplers]
    assert (clips[0] - clips[1]).abs().mean() < 0.01
    del whole, samplers, clips
    packed = 2 * sum(lean.bundle.parameter_counts()[name] for name in ("unet", "vae"))
    again = ModelSampler(lean.bundle, offload="cuda")
    assert torch.cuda.memory_allocated() - before < 2 * packed, again
