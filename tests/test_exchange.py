"""What one process gives, the others get: two processes with gloo, and with NCCL where there are two GPUs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from fvgen.workers import Workers, workers
from tests.distill.small import on_ranks


@dataclass(frozen=True)
class Parcel:
    """Tensors of many kinds and other things."""

    turned: Tensor
    few: Tensor
    number: Tensor
    none: Tensor
    coarse: Tensor
    here: Tensor
    nested: dict[str, Any]


def parcel(device: str, seed: int = 0) -> Parcel:
    """The same in every process; ``here`` stays on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 3, generator=draw)
    turned, few, number = x.t().to(device), (x > 0).to(device), torch.tensor(7 + seed, device=device)
    coarse = x.to(device, torch.bfloat16)
    return Parcel(turned, few, number, x[:0].to(device), coarse, x.clone(), {"list": [x.to(device), "text", None], "seed": seed})


def check(found: Parcel, expected: Parcel) -> None:
    """Equal, of one type and on the right device."""
    for field in fields(Parcel):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(ours, Tensor):
            assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device), field.name
            assert torch.equal(ours, theirs), field.name
    assert torch.equal(found.nested["list"][0], expected.nested["list"][0])
    assert found.nested["list"][1:] == ["text", None]
    assert found.nested["seed"] == expected.nested["seed"]


def meet(device: str) -> None:
    """What each of the processes does."""
    with workers(device) as among:
        assert among.world == 2
        check(among.share(lambda: parcel(among.device)), parcel(among.device))
        assert among.share(lambda: None) is None
        found = among.gather({10 + among.rank: parcel(among.device, among.rank)})
        assert sorted(found) == [10, 11]
        for rank in range(2):
            check(found[10 + rank], parcel(among.device, rank))
        assert among.gather({}) == {}


def part(device: str) -> None:
    """The first one fails; the others end with status 2."""
    with workers(device) as among:
        among.share(lambda: 1 / 0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def test_all_get_what_one_gives(device: str) -> None:
    assert on_ranks(2, meet, device) == [0, 0]


def test_a_failure_of_the_first_ends_the_others() -> None:
    first, second = on_ranks(2, part, "cpu")
    assert first not in (0, 2)
    assert second == 2


def test_alone_nothing_is_copied() -> None:
    mine = parcel("cpu")
    assert Workers().share(lambda: mine) is mine
    assert Workers().gather({0: mine})[0] is mine
