"""Softmax of rows: its definition in float64, conservation, limits, and the kernel in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from fvgen.kernels.row_softmax import row_softmax
from tests.processes import interpret


def test_definition():
    x = 3 * torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(row_softmax(x), x.exp() / x.exp().sum(-1, keepdim=True), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_sum_to_one_in_any_dtype(dtype):
    x = (4 * torch.randn(5, 300, generator=torch.Generator().manual_seed(1))).to(dtype)
    found = row_softmax(x)
    assert found.dtype == dtype
    # every entry is rounded by half a unit in its last place at most
    torch.testing.assert_close(found.double().sum(-1), torch.ones(5).double(), rtol=0, atol=torch.finfo(dtype).eps)


def test_large_numbers_and_what_is_left_out():
    x = torch.tensor([[1e30, 1e30, -1e30], [float("-inf"), 0.0, 0.0]])
    assert row_softmax(x).tolist() == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]


def test_strided_rows():
    x = torch.randn(6, 7, generator=torch.Generator().manual_seed(2))
    assert torch.equal(row_softmax(x.T), row_softmax(x.T.contiguous()))


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_no_rows(shape):
    with pytest.raises(ValueError, match="rows with entries"):
        row_softmax(torch.zeros(shape))


_INTERPRETED = """
import torch
from fvgen.kernels._testing import assert_close
from fvgen.kernels.row_softmax import reference, triton
from fvgen.kernels.row_softmax.spec import FORWARD
for case in FORWARD.cases:
    (x,) = case.make("cpu", torch.float32)
    assert_close(triton.row_softmax(x), reference.row_softmax(x), FORWARD.tolerance.forward, case.name)
"""


def test_kernels_in_the_interpreter(tmp_path):
    interpret(tmp_path, _INTERPRETED)
