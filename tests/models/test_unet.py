from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fvgen.models import attention, blocks
from fvgen.models.unet import VideoUNet

SMALL = {
    "in_channels": 4,
    "out_channels": 2,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "layers_per_level": 1,
    "attention_resolutions": (1,),
    "head_channels": 8,
    "context_dim": 12,
    "initial_temporal_heads": 2,
    "norm_groups": 8,
}


def _randomise(unet: VideoUNet) -> VideoUNet:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return unet.eval()


def _inputs(frames: int = 3, height: int = 4, width: int = 6, image_tokens: int = 48) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, frames, height, width, generator=generator)
    context = torch.randn(2, 77 + image_tokens, 12, generator=generator)
    return x, torch.tensor([3, 999]), context, torch.tensor([10, 24])


def test_a_new_network_predicts_zero_and_every_residual_branch_starts_closed() -> None:
    unet = VideoUNet(**SMALL)
    assert unet(*_inputs()).abs().max() == 0
    for module in unet.modules():
        if isinstance(module, blocks.TemporalTransformer | blocks.SpatialTransformer):
            assert module.proj_out.weight.abs().max() == 0
        if isinstance(module, blocks.TemporalConv):
            assert module.convs[-1].weight.abs().max() == 0


@torch.no_grad()
def test_image_tokens_are_dealt_out_per_frame_only_when_they_fit() -> None:
    unet = _randomise(VideoUNet(**SMALL, temporal_attention=False, temporal_convolution=False))
    unet.temporal_in = None
    x, t, context, fps = _inputs()
    before = unet(x, t, context, fps)
    changed = context.clone()
    changed[:, 77 + 16 : 77 + 32] += 1  # the tokens of frame 1
    moved = (unet(x, t, changed, fps) - before).abs().amax(dim=(0, 1, 3, 4)) > 1e-4
    assert moved.tolist() == [False, True, False]
    longer = torch.cat([x, x[:, :, :1]], dim=2)
    moved = (unet(longer, t, changed, fps) - unet(longer, t, context, fps)).abs().amax(dim=(0, 1, 3, 4)) > 1e-4
    assert moved.tolist() == [True] * 4


@torch.no_grad()
def test_causal_attention_hides_later_frames() -> None:
    transformer = blocks.TemporalTransformer(8, 2, 4, causal=True, groups=8)
    torch.nn.init.normal_(transformer.proj_out.weight)
    transformer.norm = torch.nn.Identity()
    x = torch.randn(4, 8, 2, 3)
    changed = x.clone()
    changed[2:] += 1
    difference = (transformer(x, 4) - transformer(changed, 4)).abs().amax(dim=(1, 2, 3))
    assert (difference[:2] == 0).all()
    assert (difference[2:] > 0).all()


@torch.no_grad()
def test_trunk_is_the_middle_blocks_output() -> None:
    unet, seen = _randomise(VideoUNet(**SMALL)), []
    unet.mid.register_forward_hook(lambda _m, _i, out: seen.append(out))
    inputs = _inputs()
    unet(*inputs)
    features = unet.trunk(*inputs)
    assert features.shape == (2, 32, 3, 2, 3)
    assert torch.equal(features.transpose(1, 2).flatten(0, 1), seen[0])


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix() -> None:
    unet = _randomise(VideoUNet(**SMALL))
    x, t, context, fps = _inputs()
    alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], context[i : i + 1], fps[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(unet(x, t, context, fps), alone, rtol=0, atol=1e-4)


def test_bad_inputs() -> None:
    unet = VideoUNet(**SMALL)
    x, t, context, fps = _inputs(height=5)
    with pytest.raises(ValueError, match="multiples of 2"):
        unet(x, t, context, fps)
    x, t, context, fps = _inputs()
    with pytest.raises(ValueError, match="the first 77"):
        unet(x, t, context[:, :50], fps)


def test_more_rows_than_a_cuda_grid_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 10, 4, 8).unbind(0)
    whole = attention.multi_head_attention(q, k, v, 2)
    monkeypatch.setattr(attention, "_MAX_ROWS", 3)
    torch.testing.assert_close(attention.multi_head_attention(q, k, v, 2), whole)


def test_importing_the_package_is_light() -> None:
    code = "import sys, fvgen, fvgen.models, fvgen.recipes.presets; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
