"""Sum with a border: where each number lies, and the kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from fvgen.kernels.padded_sum import padded_sum
from tests.processes import interpret


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 1), (1, 1), (2, 3)])
def test_inside_is_the_sum_and_the_rest_is_the_fill(before, after):
    x, other, fill = images(2, 3, 4, 5), images(2, 3, 4, 5, seed=1), images(5, seed=2)
    out = padded_sum(x, other, fill, before, after)
    assert out.shape == (2, 3 + before + after, 4 + before + after, 5)
    inside = torch.zeros(out.shape[1:3], dtype=torch.bool)
    inside[before : before + 3, before : before + 4] = True
    assert torch.equal(out[:, inside], (x + other).flatten(1, 2))
    assert torch.equal(out[:, ~inside], fill.expand_as(out[:, ~inside]))


def test_without_a_residual():
    x = images(1, 2, 2, 3)
    assert torch.equal(padded_sum(x, None, torch.zeros(3), 0, 0), x)


def test_half_precision_is_rounded_once():
    x, other = (images(1, 4, 4, 8, seed=s).bfloat16() for s in (3, 4))
    expected = (x.double() + other.double()).bfloat16()
    assert torch.equal(padded_sum(x, other, x.new_zeros(8), 0, 0), expected)


def test_what_does_not_fit():
    x = images(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"fill \[C\]"):
        padded_sum(x, None, torch.zeros(3), 1, 1)
    with pytest.raises(ValueError, match="residual must be like x"):
        padded_sum(x, x[:, :1], torch.zeros(4), 1, 1)
    with pytest.raises(ValueError, match="0 or more pixels"):
        padded_sum(x, None, torch.zeros(4), -1, 1)


_INTERPRETED = """
import torch
from fvgen.kernels._testing import assert_close, poisoned_memory
from fvgen.kernels.padded_sum import reference, triton
from fvgen.kernels.padded_sum.spec import FORWARD
for case in FORWARD.cases:
    args = case.make("cpu", torch.float32)
    with poisoned_memory():
        found = triton.padded_sum(*args)
    assert_close(found, reference.padded_sum(*args), 0, case.name)
"""


def test_kernels_in_the_interpreter(tmp_path):
    interpret(tmp_path, _INTERPRETED)
