"""PSNR and SSIM against closed forms and an independent computation."""

from __future__ import annotations

import math

import pytest
import torch

from fvgen.evaluation.metrics import mean_psnr, mean_ssim, psnr


def frames(seed: int = 0, shape: tuple[int, ...] = (2, 3, 24, 32)) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offset", [0.5, 0.1, 0.01])
def test_psnr_of_a_constant_offset(offset):
    truth = torch.full((2, 3, 8, 8), 0.25)
    torch.testing.assert_close(psnr(truth + offset, truth), torch.full((2,), -20 * math.log10(offset)), rtol=1e-4, atol=0)


def test_psnr_of_identical_images_is_infinite():
    assert psnr(frames(), frames()).isinf().all()


def test_only_masked_pixels_count():
    truth = frames()
    image = truth.clone()
    mask = torch.zeros(2, 24, 32, dtype=torch.bool)
    mask[:, :6] = True
    image[:, :, :6] += 0.1
    image[:, :, 6:] = 7.0
    torch.testing.assert_close(psnr(image, truth, mask), torch.full((2,), 20.0), rtol=1e-4, atol=0)


def test_frames_with_an_empty_mask_are_left_out_of_the_mean():
    truth = frames()
    mask = torch.zeros(2, 24, 32, dtype=torch.bool)
    mask[1] = True
    assert psnr(truth + 0.1, truth, mask).isnan().tolist() == [True, False]
    assert mean_psnr(truth + 0.1, truth, mask) == pytest.approx(20.0, rel=1e-4)


def test_half_precision_is_computed_in_single():
    truth = frames()
    assert psnr((truth + 0.1).half(), truth.half()).dtype == torch.float32


def ssim_in_double(a: torch.Tensor, b: torch.Tensor) -> float:
    """Wang et al. 2004, window by window: means, variances and covariance under one normalised 11 x 11 Gaussian."""
    g = torch.exp(-(torch.arange(-5, 6, dtype=torch.float64) ** 2) / 4.5)
    w = torch.outer(g, g) / g.sum() ** 2
    x, y = (v.double().unfold(-2, 11, 1).unfold(-2, 11, 1) for v in (a, b))
    x, y = x.transpose(-1, -2), y.transpose(-1, -2)
    mx, my = (w * x).sum((-2, -1)), (w * y).sum((-2, -1))
    dx, dy = x - mx[..., None, None], y - my[..., None, None]
    vx, vy, vxy = (w * dx * dx).sum((-2, -1)), (w * dy * dy).sum((-2, -1)), (w * dx * dy).sum((-2, -1))
    c1, c2 = 1e-4, 9e-4
    return float(((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.5])
def test_ssim_is_the_published_formula(noise):
    truth = frames()
    image = (truth + noise * (frames(1) - 0.5)).clamp(0, 1)
    assert mean_ssim(image, truth) == pytest.approx(ssim_in_double(image, truth), abs=1e-4)


def test_ssim_of_identical_images_is_one_and_falls_with_noise():
    truth = frames()
    scores = [mean_ssim((truth + s * (frames(1) - 0.5)).clamp(0, 1), truth) for s in (0.0, 0.2, 1.0)]
    assert scores[0] == pytest.approx(1.0, abs=1e-5)
    assert scores == sorted(scores, reverse=True)
