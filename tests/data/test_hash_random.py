"""Statistics of the counter-based numbers; every bound is five standard errors, which a sound generator passes."""

from __future__ import annotations

import math

import torch

from fvgen.utils.hash_random import HashRandom

SEEDS = torch.arange(64)
N = 4096
TOTAL = len(SEEDS) * N


def test_uniform_moments_and_histogram() -> None:
    x = HashRandom(SEEDS).uniform(N).double()
    assert x.min() >= 0
    assert x.max() < 1
    assert abs(x.mean() - 0.5) < 5 * math.sqrt(1 / 12 / TOTAL)
    assert abs(x.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / TOTAL)
    bins = 256
    counts = torch.histc(x, bins, 0, 1)
    chi_square = ((counts - TOTAL / bins) ** 2 / (TOTAL / bins)).sum()
    assert abs(chi_square - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


def test_neighbouring_seeds_streams_and_draws_are_uncorrelated() -> None:
    def rows(seeds: torch.Tensor, stream: int = 0) -> torch.Tensor:
        x = HashRandom(seeds, stream).uniform(N).double() - 0.5
        return x / x.std(1, keepdim=True)

    base = rows(SEEDS)
    limit = 5 / math.sqrt(TOTAL)
    assert abs((base * rows(SEEDS + 1)).mean()) < limit
    assert abs((base * rows(SEEDS, 1)).mean()) < limit
    assert abs((base[:, 1:] * base[:, :-1]).mean()) < limit
    correlations = base @ base.T / N
    correlations.fill_diagonal_(0)
    assert correlations.abs().max() < 5.5 / math.sqrt(N)  # the largest of 2016 pairs


def test_normal_moments_and_tails() -> None:
    x = HashRandom(SEEDS, stream=3).normal(N).double()
    assert abs(x.mean()) < 5 / math.sqrt(TOTAL)
    assert abs(x.var() - 1) < 5 * math.sqrt(2 / TOTAL)
    assert abs((x**3).mean()) < 5 * math.sqrt(15 / TOTAL)
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96 / TOTAL)
    for limit in (1.0, 2.0, 3.0):
        tail = math.erfc(limit / math.sqrt(2))
        assert abs((x.abs() > limit).double().mean() - tail) < 5 * math.sqrt(tail / TOTAL)
    assert x.isfinite().all()


def test_integers_cover_their_range_evenly() -> None:
    x = HashRandom(SEEDS).integers(14, N)
    counts = torch.bincount(x.flatten(), minlength=14).double()
    assert len(counts) == 14
    assert ((counts - TOTAL / 14) ** 2 / (TOTAL / 14)).sum() < 13 + 5 * math.sqrt(26)


def test_a_row_depends_on_its_seed_alone() -> None:
    seeds = torch.tensor([5, -3, 1 << 40, 5])
    batch, alone = HashRandom(seeds, 2), [HashRandom(seeds[i : i + 1], 2) for i in range(4)]
    for _ in range(2):  # the second draw goes on where the first one ended
        drawn = batch.uniform(3, 5, low=-2, high=7)
        assert torch.equal(drawn, torch.cat([r.uniform(3, 5, low=-2, high=7) for r in alone]))
        assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])


def test_split_draws_equal_one_draw() -> None:
    one, two = HashRandom(SEEDS), HashRandom(SEEDS)
    assert torch.equal(one.uniform(10), torch.cat([two.uniform(4), two.uniform(6)], 1))


def test_mixing_is_split_mix_64() -> None:
    """The reference generator (Steele, Lea, Flood 2014), written with Python's integers."""
    mask = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    for seed in (0, 1, 123456789, -1):
        key = mix(mix((seed + 0x9E3779B97F4A7C15) & mask))
        expected = [mix((key + i * 0x9E3779B97F4A7C15) & mask) >> 40 for i in range(5)]
        found = HashRandom(torch.tensor([seed])).uniform(5)[0].double() * 2**24
        assert found.long().tolist() == expected
