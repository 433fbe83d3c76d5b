"""The faults that depth maps are given."""

from __future__ import annotations

import math

import pytest
import torch

from fvgen.data.synthetic.depth import imperfect_depth
from fvgen.utils.hash_random import HashRandom

MAPS, SIZE = 300, (40, 64)
SEEDS = torch.arange(MAPS)
RGB = HashRandom(SEEDS, stream=9).uniform(3, *SIZE)
FLAT = torch.full((MAPS, *SIZE), 3.0)
ALL = torch.ones(MAPS, *SIZE, dtype=torch.bool)


@pytest.fixture(scope="module")
def degraded() -> tuple[torch.Tensor, torch.Tensor]:
    return imperfect_depth(HashRandom(SEEDS), FLAT, RGB, ALL)


def test_noise_level(degraded: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Sigma lies between 10^-3.2 and 10^-2; the weights 0.8, 0.6, 0.4 of its three parts add up to a variance of 1.16 at most."""
    error = degraded[0] / 3.0 - 1
    rms = error.square().mean((1, 2)).sqrt()
    assert rms.min() > 0.4 * 10**-3.2 * 0.9  # the pixel noise alone, over 2560 pixels
    assert rms.max() < 2 * math.sqrt(1.16) * 1e-2  # the slowest part has only a few independent values per map
    assert rms.min() < 1e-3
    assert rms.max() > 5e-3  # both ends of the range occur among 300 maps
    assert abs(error.mean()) < 5e-4


def test_valid_share(degraded: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Before specks and erosion at most 45 % are holes, and 0.1 / 0.55 of the maps have none; 40 % of those are not eroded."""
    share = degraded[1].float().mean((1, 2))
    assert 0.5 < share.mean() < 0.9
    assert (share > 0.99).float().mean() > 0.01
    assert (share < 0.5).float().mean() > 0.02


def test_what_the_other_photo_does_not_see_is_dropped_in_85_percent_of_the_maps() -> None:
    visible = ALL.clone()
    visible[:, :, :32] = False
    _, valid = imperfect_depth(HashRandom(SEEDS), FLAT, RGB, visible)
    kept = valid[:, :, :32].flatten(1).any(1).float().mean()
    assert abs(kept - 0.15) < 4 * math.sqrt(0.15 * 0.85 / MAPS)
    assert valid[:, :, 36:].flatten(1).any(1).all()


def test_holes_prefer_flat_regions() -> None:
    rgb = RGB.clone()
    rgb[..., :32] = 0.5
    _, valid = imperfect_depth(HashRandom(SEEDS), FLAT, rgb, ALL)
    assert valid[..., 36:].float().mean() > valid[..., :28].float().mean() + 0.2


def test_edges_bleed_between_the_two_depths() -> None:
    step = FLAT.clone()
    step[..., 32:] = 6.0
    noisy, _ = imperfect_depth(HashRandom(SEEDS), step, RGB, ALL)
    wrong = (noisy / step - 1).abs() > 0.2
    assert not wrong[..., :30].any()
    assert not wrong[..., 34:].any()
    share = wrong[..., 30:34].flatten(1).any(1).float().mean()
    assert abs(share - 0.6) < 4 * math.sqrt(0.6 * 0.4 / MAPS) + 0.02
    assert ((noisy > 3 * 0.9) & (noisy < 6 * 1.1)).all()


def test_a_map_depends_on_its_seed_alone(degraded: tuple[torch.Tensor, torch.Tensor]) -> None:
    pick = [7, 2]
    noisy, valid = imperfect_depth(HashRandom(SEEDS[pick]), FLAT[pick], RGB[pick], ALL[pick])
    assert torch.equal(noisy, degraded[0][pick])
    assert torch.equal(valid, degraded[1][pick])
