"""The seeded stream of noise."""

from __future__ import annotations

import pytest
import torch

from fvgen.diffusion.noise import recorded_noise, seeded_noise
from fvgen.kernels._philox import normal


def test_draws_follow_each_other_in_one_stream():
    """Draws of 2 x 5 and 1 x 4 numbers use counters 0 .. 3 (two a sample, the last ones in part) and 4."""
    draw = seeded_noise(7)
    numbers = normal(7, torch.arange(5))
    assert torch.equal(draw((2, 5)), numbers[:4].reshape(2, 8)[:, :5])
    assert torch.equal(draw((1, 4)), numbers[4:])


def test_a_seed_is_its_stream():
    first, again, other = seeded_noise(2**62 + 1), seeded_noise(2**62 + 1), seeded_noise(1)
    for _ in range(2):
        noise = first((2, 4, 3, 8, 8))
        assert torch.equal(noise, again((2, 4, 3, 8, 8)))
        assert not torch.equal(noise, other((2, 4, 3, 8, 8)))
    assert noise.dtype == torch.float32


def test_standard_normal_and_independent():
    """Moments of 2^18 numbers within four standard errors; samples and draws do not correlate."""
    draw = seeded_noise(0)
    x, y = (draw((2, 2**17)).double() for _ in range(2))
    n = x.numel()
    for moment, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**moment).mean()) - expected) < 4 * (spread / n) ** 0.5
    for a, b in ((x[0], x[1]), (x[0], y[0]), (x[0, 1:], x[0, :-1])):
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5


@pytest.mark.gpu
def test_a_gpu_draws_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    on_cpu, on_gpu = seeded_noise(3), seeded_noise(3, "cuda")
    for shape in ((2, 4, 16, 40, 64), (1, 4, 3, 5, 7)):
        torch.testing.assert_close(on_gpu(shape).cpu(), on_cpu(shape), rtol=2e-6, atol=2e-6)


def test_recorded_noise_is_handed_out_once():
    draw = recorded_noise([torch.ones(2)])
    assert torch.equal(draw((2,)), torch.ones(2))
    with pytest.raises(ValueError, match="none left"):
        draw((2,))
