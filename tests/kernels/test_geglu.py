"""GEGLU against PyTorch's own GELU and autograd, its conventions, and the kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fvgen.kernels.geglu import geglu, reference
from tests.processes import interpret


def test_the_gate_is_the_second_half():
    x = torch.randn(3, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(geglu(x), x[..., :5] * functional.gelu(x[..., 5:]), rtol=1e-12, atol=1e-12)
    assert (geglu(torch.tensor([1.0, 2.0, 0.0, 0.0])) == 0).all()


def test_gradient_is_that_of_autograd():
    x = torch.randn(4, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    upstream = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (expected,) = torch.autograd.grad(x[:, :7] * functional.gelu(x[:, 7:]), x, upstream)
    (found,) = torch.autograd.grad(geglu(x), x, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_gelu_is_exact():
    """The tanh approximation is off by up to 5e-4."""
    gate = torch.linspace(-5, 5, 101, dtype=torch.float64)
    found = geglu(torch.cat([torch.ones_like(gate), gate]))
    exact = gate * torch.special.ndtr(gate)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-15)
    assert (found - functional.gelu(gate, approximate="tanh")).abs().max() > 1e-4


def test_tails_are_finite():
    x = torch.tensor([[2.0, 2.0, 80.0, -80.0]], requires_grad=True)
    out = geglu(x)
    out.sum().backward()
    assert out.tolist() == [[160.0, 0.0]]
    assert x.grad.tolist() == [[80.0, 0.0, 2.0, 0.0]]


def test_half_precision_is_rounded_once():
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    value, gate = x.double().chunk(2, -1)
    exact = value * functional.gelu(gate)
    assert ((geglu(x).double() - exact).abs() <= 1.01 * 2 ** (exact.abs().log2().floor() - 8)).all()
    assert (geglu(x).double() - exact).norm() < 0.8 * (reference.eager(x).double() - exact).norm()


def test_strided_input():
    x = torch.randn(6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    strided = x.permute(1, 2, 0).requires_grad_()
    out = geglu(strided)
    assert torch.equal(out, geglu(strided.contiguous()))
    assert torch.autograd.gradcheck(geglu, strided)


def test_odd_width_is_named():
    with pytest.raises(RuntimeError, match="even"):
        torch.ops.fvgen.geglu(torch.empty(2, 5, device="meta"))
    with pytest.raises(ValueError, match="even"):
        geglu(torch.randn(2, 5))


_INTERPRETED = """
import torch
from fvgen.kernels.geglu import reference, spec, triton
for found_by, expected_by, op in ((triton.geglu, reference.geglu, spec.FORWARD),
                                  (triton.geglu_backward, reference.geglu_backward, spec.BACKWARD)):
    for case in op.cases:
        for dtype, allowed in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
            args = case.make("cpu", dtype)
            expected, found = expected_by(*args), found_by(*args)
            assert found.shape == expected.shape and found.dtype == dtype, case.name
            assert not expected.numel() or (expected - found).abs().max() <= allowed * expected.abs().max(), case.name
"""


def test_kernels_in_the_interpreter(tmp_path):
    interpret(tmp_path, _INTERPRETED)
