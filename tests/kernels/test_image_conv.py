"""Convolutions from and to images against PyTorch's own in float64, and the kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fvgen.kernels.image_conv import conv_from_image, conv_to_image, pack_from_image, pack_to_image
from tests.processes import interpret


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("biased", [False, True])
def test_from_an_image(biased):
    x, weight, bias = draw(2, 3, 6, 5), draw(7, 3, 3, 3, seed=1), draw(7, seed=2) if biased else None
    found = conv_from_image(x, pack_from_image(weight), bias)
    torch.testing.assert_close(found.permute(0, 3, 1, 2), F.conv2d(x, weight, bias, padding=1), rtol=1e-12, atol=1e-12)


def test_to_an_image():
    x, weight, bias = draw(2, 6, 5, 11), draw(3, 11, 3, 3, seed=1), draw(3, seed=2)
    found = conv_to_image(x, pack_to_image(weight), bias)
    torch.testing.assert_close(found, F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=1), rtol=1e-12, atol=1e-12)


def test_a_single_tap_moves_the_image():
    """The weight's upper left tap takes what lies one row up and one column to the left."""
    x, weight = draw(1, 1, 4, 4), torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    weight[0, 0, 0, 0] = 1
    moved = F.pad(x, (1, 0, 1, 0))[..., :4, :4]
    assert torch.equal(conv_from_image(x, pack_from_image(weight)).permute(0, 3, 1, 2), moved)
    assert torch.equal(conv_to_image(x.permute(0, 2, 3, 1), pack_to_image(weight), torch.zeros(1).double()), moved)


def test_dtypes():
    """An image of its own dtype is rounded to that of the weight; an image that is made is not rounded at all."""
    x, weight = draw(1, 3, 4, 4).float(), draw(8, 3, 3, 3, seed=1).bfloat16()
    out = conv_from_image(x, pack_from_image(weight))
    assert out.dtype == torch.bfloat16
    expected = F.conv2d(x.bfloat16().double(), weight.double(), padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)
    back = conv_to_image(out, pack_to_image(draw(2, 8, 3, 3, seed=3).bfloat16()), torch.zeros(2))
    assert back.dtype == torch.float32


def test_what_does_not_fit():
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"weight \[9 C, O\]"):
        conv_from_image(x, torch.zeros(26, 8))
    with pytest.raises(ValueError, match="bias must have shape"):
        conv_from_image(x, torch.zeros(27, 8), torch.zeros(7))
    with pytest.raises(ValueError, match=r"weight \[C, 9 O\]"):
        conv_to_image(x, torch.zeros(4, 26), torch.zeros(3))
    with pytest.raises(ValueError, match="bias must have shape"):
        conv_to_image(x, torch.zeros(4, 27), torch.zeros(2))


_INTERPRETED = """
import torch
from fvgen.kernels._testing import assert_close, poisoned_memory
from fvgen.kernels.image_conv import reference, triton
from fvgen.kernels.image_conv.spec import SPECS
for spec in SPECS:
    for case in spec.cases:
        args = case.make("cpu", torch.float32)
        if spec.supports(*args) is None:
            with poisoned_memory():
                found = getattr(triton, spec.name)(*args)
            assert_close(found, spec.reference(*args), spec.tolerance.forward, case.name)
"""


def test_kernels_in_the_interpreter(tmp_path):
    interpret(tmp_path, _INTERPRETED)
