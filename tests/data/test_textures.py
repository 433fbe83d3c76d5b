"""Textures: periodic, averaged from level to level, looked up at the right place."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from fvgen.data.synthetic.textures import TEXTURE_SIZE, TEXTURES, TextureBank, make_textures, sample_textures
from fvgen.utils.hash_random import HashRandom

SEEDS = torch.tensor([3, 8])


@pytest.fixture(scope="module")
def bank() -> TextureBank:
    return make_textures(HashRandom(SEEDS, stream=2))


def _levels(bank: TextureBank) -> list[torch.Tensor]:
    """``[2 * TEXTURES, 3, S, S]`` per level."""
    texels, levels, start, size = bank.texels.unflatten(0, (-1, bank.stride)), [], 0, TEXTURE_SIZE
    while start < bank.stride:
        levels.append(texels[:, start : start + size * size].unflatten(1, (size, size)).permute(0, 3, 1, 2))
        start, size = start + size * size, size // 2
    return levels


def test_every_level_averages_the_one_before(bank: TextureBank) -> None:
    levels = _levels(bank)
    assert [x.shape[-1] for x in levels] == [256, 128, 64, 32, 16, 8, 4]
    assert len(levels[0]) == len(SEEDS) * TEXTURES
    for fine, coarse in pairwise(levels):
        assert torch.allclose(F.avg_pool2d(fine, 2), coarse, atol=1e-6)


def test_colours(bank: TextureBank) -> None:
    finest = _levels(bank)[0]
    assert finest.min() >= 0.01
    assert finest.max() <= 1.0
    assert (finest.std((1, 2, 3)) > 0.003).all()


def test_no_seam(bank: TextureBank) -> None:
    """The step from the last texel to the first is no larger than steps elsewhere, over all textures."""
    x = _levels(bank)[0]
    for axis in (-1, -2):
        step = (x - x.roll(1, axis)).abs().mean((0, 1, -3 - axis))
        assert step[0] < 1.5 * step.mean()


def test_lookup_at_texel_centres(bank: TextureBank) -> None:
    levels, texture = _levels(bank), torch.tensor([0, TEXTURES + 5])
    for level, cell in ((0, (3, 250)), (2, (63, 0)), (6, (1, 2))):
        size = TEXTURE_SIZE >> level
        uv = torch.tensor([(cell[1] + 0.5) / size, (cell[0] + 0.5) / size]).expand(2, 2)
        found = sample_textures(bank, texture, uv, torch.full((2,), 2.0**level / TEXTURE_SIZE))
        assert torch.allclose(found, levels[level][texture, :, cell[0], cell[1]], atol=1e-4)


def test_lookup_blends_levels_and_repeats(bank: TextureBank) -> None:
    uv = HashRandom(SEEDS).uniform(50, 2)
    texture = torch.tensor([[1], [TEXTURES + 2]]).expand(2, 50)

    def at(uv: torch.Tensor, texels: float) -> torch.Tensor:
        return sample_textures(bank, texture, uv, torch.full((2, 50), texels / TEXTURE_SIZE))

    between = at(uv, 2.0**1.25)
    assert torch.allclose(between, 0.75 * at(uv, 2.0) + 0.25 * at(uv, 4.0), atol=1e-5)
    shift = torch.tensor([3.0, -2.0])
    assert torch.allclose(at(uv + shift, 4.0), at(uv, 4.0), atol=2e-3)  # float32 of u + 3 moves the look-up by 2e-7 periods
    assert torch.equal(at(uv, 0.01), at(uv, 1.0))
    assert torch.equal(at(uv, 1e6), at(uv, 64.0))
