"""Preprocessing for the image tower."""

from __future__ import annotations

import torch

from fvgen.models.clip_preprocess import clip_preprocess


def test_gradients_flow_after_a_first_use_for_inference():
    """Constants kept from an inference call must not make a later training step fail."""
    with torch.inference_mode():
        clip_preprocess(torch.zeros(1, 3, 40, 61), size=16)
    image = torch.zeros(1, 3, 40, 61, requires_grad=True)
    clip_preprocess(image, size=16).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
