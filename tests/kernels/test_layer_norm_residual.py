"""Layer normalisation of a residual sum against torch.nn.functional, and the kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fvgen.kernels.layer_norm_residual import layer_norm_residual
from tests.processes import interpret

NAMES = ("x", "weight", "bias", "residual")


def inputs(*shape: int) -> dict:
    random = torch.Generator().manual_seed(0)
    shapes = (shape, shape[-1:], shape[-1:], shape)
    values = (torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes)
    return dict(zip(NAMES, values, strict=True))


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("shape", [(7, 40), (2, 3, 5, 32), (1, 1), (9,)])
def test_equals_pytorch_in_float64(shape, with_residual):
    given = inputs(*shape)
    if not with_residual:
        del given["residual"]
    total = given["x"] + given["residual"] if with_residual else given["x"]
    expected = F.layer_norm(total, shape[-1:], given["weight"], given["bias"], 1e-5)
    found = layer_norm_residual(**given)
    torch.testing.assert_close(found.out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.total, total, rtol=0, atol=0)
    upstream = torch.randn(2, *shape, dtype=torch.float64)
    losses = ((o * upstream[0] + t * upstream[1]).sum() for o, t in (found, (expected, total)))
    gradients = (torch.autograd.grad(loss, list(given.values())) for loss in losses)
    for name, a, b in zip(given, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("used", ["out", "total"])
def test_gradient_when_one_output_is_unused(used):
    given = inputs(6, 8)
    total = given["x"] + given["residual"]
    expected = F.layer_norm(total, (8,), given["weight"], given["bias"], 1e-5) if used == "out" else total
    getattr(layer_norm_residual(**given), used).square().sum().backward()
    for name in ("x", "residual"):
        (gradient,) = torch.autograd.grad(expected.square().sum(), [given[name]], retain_graph=True)
        torch.testing.assert_close(given[name].grad, gradient, rtol=1e-8, atol=1e-8)


def test_bfloat16_normalises_the_sum_that_it_returns():
    given = {name: v.detach().bfloat16() for name, v in inputs(4, 64).items()}
    found = layer_norm_residual(**given)
    again = layer_norm_residual(found.total, given["weight"], given["bias"])
    assert torch.equal(found.out, again.out)
    assert torch.equal(found.total, given["x"] + given["residual"])


def test_strided_input():
    given = {name: v.detach() for name, v in inputs(3, 5, 8).items()}
    strided = given["x"].transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(layer_norm_residual(**{**given, "x": strided}).out, layer_norm_residual(**given).out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 0)}, "C > 0"),
        ({"weight": torch.zeros(7)}, "weight"),
        ({"bias": torch.zeros(8)}, "dtype"),
        ({"residual": torch.zeros(1, 8)}, "residual"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        layer_norm_residual(**{**inputs(3, 8), **change})


_INTERPRETED = """
from types import SimpleNamespace
import torch
from fvgen.kernels._testing import assert_close, largest_error, poisoned_memory
from fvgen.kernels.layer_norm_residual import reference, spec, triton

def compare(fast, reference, args, what):
    with poisoned_memory():
        found = fast(*args)
    double = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    for name, f, e in zip("abcd", found, reference(*double)):
        assert_close(f, e.float(), 1e-5, f"{what} {name}")
    return found

torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=1)  # several steps per program
for shape in ((1, 32), (7, 40), (130, 40), (41, 320), (23, 1280), (0, 8)):
    for residual in (True, False):
        args = spec._inputs("cpu", torch.float32, shape=shape, residual=residual)
        out, total, mean, rstd = compare(triton.layer_norm_residual, reference.layer_norm_residual, args, (shape, residual))
        x = total if residual else args[0]
        given = (torch.randn(shape), torch.randn_like(args[1]), x, args[2], mean, rstd)
        compare(triton.layer_norm_residual_backward, reference.layer_norm_residual_backward, given, (shape, "backward"))

# a large offset: no worse than 1.5 times PyTorch
x, residual, weight, bias, eps = spec._inputs("cpu", torch.float32, shape=(50, 320), residual=False)
x = x + 1000
exact = reference.layer_norm_residual(*(t.double() for t in (x, residual, weight, bias)), eps)[0]
mine = largest_error(triton.layer_norm_residual(x, residual, weight, bias, eps)[0], exact)
assert mine <= 1.5 * largest_error(spec._library(x, residual, weight, bias, eps)[0], exact), mine
"""


def test_kernels_in_the_interpreter(tmp_path):
    interpret(tmp_path, _INTERPRETED)


@pytest.mark.parametrize("warps", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("channels", [1, 3, 32, 40, 256, 257, 320, 512, 513, 1280, 2048])
def test_tiles_of_the_backward_pass_hold_a_row(channels, warps):
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from fvgen.kernels.layer_norm_residual.triton import backward_tile

    tile = backward_tile(channels, warps)
    assert channels <= tile["BLOCK_C"] * (1 + tile["HALVES"]) < 2 * channels
    assert tile["BLOCK_R"] * tile["BLOCK_C"] == 256 * tile["num_warps"]
    assert tile["num_warps"] == warps or (tile["num_warps"] > warps and tile["BLOCK_R"] == 1)


@pytest.mark.gpu
def test_gradients_repeat_bit_by_bit(monkeypatch):
    from fvgen.kernels.layer_norm_residual.spec import BACKWARD, layer_norm_residual_backward_op

    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    args = BACKWARD.benchmarks[0].make("cuda", torch.bfloat16)
    first, second = (layer_norm_residual_backward_op(*args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
