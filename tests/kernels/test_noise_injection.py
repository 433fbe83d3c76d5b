"""The noise stream, the formula and, through Triton's interpreter, the kernel itself."""

from __future__ import annotations

import pytest
import torch

from fvgen.kernels._philox import normal_like, philox
from fvgen.kernels.noise_injection import noise_injection
from tests.processes import interpret

TABLES = torch.rand(3, 50, generator=torch.Generator().manual_seed(1))


def test_philox_known_answers():
    """The published test vectors of Philox4x32-10 that have this counter layout (two zero words)."""
    words = [int(w) for w in torch.stack(philox(0, torch.zeros((), dtype=torch.int64)))]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_is_standard_normal_and_uncorrelated():
    noise = normal_like(torch.empty(4, 40000), seed=3, offset=10).double()
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / count) ** 0.5
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 5 / 40000**0.5
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 5 / count**0.5


def test_samples_use_their_own_counters():
    whole = normal_like(torch.empty(3, 10), seed=5, offset=7)
    assert torch.equal(whole[1:], normal_like(torch.empty(2, 10), seed=5, offset=7 + 3))
    assert not torch.equal(whole, normal_like(torch.empty(3, 10), seed=6, offset=7))


def test_formula_in_float64():
    x0, t = torch.randn(4, 3, 5, dtype=torch.float64), torch.tensor([0, 49, 7, 7])
    out = noise_injection(x0, t, TABLES, 1, want_noise=True, want_velocity=True)
    a, b, s = (TABLES[i, t].double()[:, None, None] for i in range(3))
    torch.testing.assert_close(out.x_t, a * s * x0 + b * out.noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.velocity, a * out.noise - b * s * x0, rtol=1e-12, atol=1e-12)


def test_the_same_noise_for_real_and_generated_clips():
    real, fake, t = torch.randn(2, 9), torch.randn(2, 9), torch.tensor([3, 4])
    a, b = (noise_injection(x, t, TABLES, 9, 100, want_noise=True).noise for x in (real, fake))
    assert torch.equal(a, b)


def test_unasked_outputs_are_none():
    out = noise_injection(torch.randn(2, 3), torch.tensor([0, 1]), TABLES, 0)
    assert out.noise is None
    assert out.velocity is None


def test_wrong_shapes_are_named():
    with pytest.raises((RuntimeError, IndexError)):
        torch.ops.fvgen.noise_injection(torch.randn(2, 3), torch.tensor([0, 1]), TABLES[:2], 0, 0, False, False)


_INTERPRETED = """
import torch
from fvgen.kernels.noise_injection import reference, triton
for shape in ((2, 3, 5, 7), (1, 1030), (3, 4)):
    x, t, tables = torch.randn(shape), torch.randint(0, 10, shape[:1]), torch.rand(3, 10)
    for seed, offset in ((0, 0), (123456789012, 2**33 + 5), (7, 2**31 - 3)):
        for expected, found in zip(reference.noise_injection(x, t, tables, seed, offset, True, True),
                                   triton.noise_injection(x, t, tables, seed, offset, True, True)):
            assert (expected - found).abs().max() < 2e-6, (shape, seed, offset)
    g, gv = torch.randn(shape), torch.randn(shape)
    for velocity in (gv, gv[:0, :0].reshape(0)):
        expected = reference.noise_injection_backward(g, velocity, t, tables)
        assert (expected - triton.noise_injection_backward(g, velocity, t, tables)).abs().max() < 1e-6
"""


def test_kernel_in_the_interpreter(tmp_path):
    """Noise, formula and masks of the Triton kernels, in float32 (the interpreter's bfloat16 is not to be trusted)."""
    interpret(tmp_path, _INTERPRETED)
