"""Classifier head and trunk: shapes, start, independence of samples, gradient through the frozen trunk."""

from __future__ import annotations

import pytest
import torch

from fvgen.distill.classifier import ClassifierConfig, ClassifierHead, unet_trunk
from fvgen.distill.losses import student_adversarial
from fvgen.models.unet import VideoUNet
from fvgen.types import Condition

SMALL = ClassifierConfig(in_channels=32, width=16, groups=4)


def head_with_signal(config: ClassifierConfig) -> ClassifierHead:
    head = ClassifierHead(config)
    torch.nn.init.normal_(head.out.weight)
    return head


def test_ratio_is_one_before_the_first_update():
    logits = ClassifierHead(SMALL)(torch.randn(3, 32, 5, 3, 4))
    assert logits.shape == (3,)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, torch.zeros(3))


def test_a_logit_does_not_depend_on_the_rest_of_the_batch():
    head = head_with_signal(SMALL).double()
    x = torch.randn(3, 32, 4, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(head(x)[:1], head(x[:1]))


def test_bad_sizes():
    with pytest.raises(ValueError, match="divisible"):
        ClassifierConfig(width=20, groups=16)


def test_gradient_reaches_the_input_through_the_frozen_trunk():
    torch.manual_seed(0)
    unet = VideoUNet(
        in_channels=8, model_channels=32, channel_mult=(1, 1), layers_per_level=1, attention_resolutions=(1,), head_channels=16,
        context_dim=16, text_tokens=2, image_tokens_per_frame=1, initial_temporal_heads=2,
    ).requires_grad_(False)  # fmt: skip
    trunk, head = unet_trunk(unet), head_with_signal(SMALL)
    condition = Condition(torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, 16), None, torch.tensor([10, 10]))
    x = torch.randn(2, 4, 3, 4, 4, requires_grad=True)
    features = trunk(x, torch.tensor([10, 900]), condition)
    assert features.shape == (2, 32, 3, 2, 2)
    student_adversarial(head(features)).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in unet.parameters())
