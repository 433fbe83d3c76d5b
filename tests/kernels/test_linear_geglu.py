"""Linear layer with GEGLU against PyTorch's own layers and autograd, its conventions, and the kernels in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fvgen.kernels._testing import assert_close, poisoned_memory
from fvgen.kernels.linear_geglu import linear_geglu, reference
from tests.processes import interpret


def layer(shape: tuple[int, ...], channels: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple:
    random = torch.Generator().manual_seed(0)
    shapes = (shape, (2 * channels, shape[-1]), (2 * channels,))
    x, weight, bias = (torch.randn(s, generator=random, dtype=torch.float64) for s in shapes)
    return tuple(t.to(device, dtype) for t in (x, weight / math.sqrt(shape[-1]), bias))


def plain(x, weight, bias):
    value, gate = functional.linear(x, weight, bias).chunk(2, -1)
    return value * functional.gelu(gate)


def test_value_and_gate_of_a_linear_layer():
    args = layer((2, 3, 7), 5)
    torch.testing.assert_close(linear_geglu(*args), plain(*args), rtol=1e-12, atol=1e-12)
    x, weight, bias = args
    closed = bias.clone()
    closed[5:] = -1e3  # the second half is the gate
    assert (linear_geglu(x, weight, closed) == 0).all()


def test_gradients_are_those_of_autograd():
    args = tuple(t.requires_grad_() for t in layer((4, 3, 6), 5))
    upstream = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(plain(*args), args, upstream)
    found = torch.autograd.grad(linear_geglu(*args), args, upstream)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


def test_half_precision_is_rounded_once():
    args = layer((64, 48), 40, torch.bfloat16)
    exact = plain(*(t.double() for t in args))
    found = linear_geglu(*args).double()
    # float32 sums of 48 products are off by less than 1e-6, which counts where the result is small
    assert ((found - exact).abs() <= 1.01 * 2 ** (exact.abs().log2().floor() - 8) + 1e-6).all()
    assert (found - exact).norm() < 0.6 * (reference.eager(*args).double() - exact).norm()


def test_strided_arguments():
    x, weight, bias = layer((5, 4, 6), 3)
    args = (x.transpose(0, 1), weight.flip(0).T.contiguous().T, bias)
    assert not args[0].is_contiguous()
    assert not args[1].is_contiguous()
    torch.testing.assert_close(linear_geglu(*args), plain(*args), rtol=1e-12, atol=1e-12)


def test_wrong_arguments_are_named():
    x, weight, bias = layer((4, 6), 3)
    with pytest.raises(ValueError, match=r"x \[\.\.\., K\]"):
        linear_geglu(x[:, :5], weight, bias)
    with pytest.raises(ValueError, match=r"x \[\.\.\., K\]"):
        linear_geglu(x, weight[:5], bias[:5])
    with pytest.raises(ValueError, match=r"shape \[6\]"):
        linear_geglu(x, weight, bias[:3])
    with pytest.raises(ValueError, match="dtype"):
        linear_geglu(x, weight.float(), bias)
    with pytest.raises(RuntimeError, match="same K"):
        torch.ops.fvgen.linear_geglu(*(t.to("meta") for t in (x[:, :5], weight, bias)))


_GELU = """
import triton, triton.language as tl, torch
from fvgen.kernels.geglu.triton import gelu

@triton.jit
def kernel(g_ptr, out_ptr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    tl.store(out_ptr + o_n, gelu(tl.load(g_ptr + o_n), False))

gate = torch.linspace(-6.4, 6.4, 4096)
out = torch.empty_like(gate)
kernel[(1,)](gate, out, N=4096)
exact = gate.double() * torch.special.ndtr(gate.double())
assert ((out - exact).abs() <= 2e-5 * exact.abs()).all(), ((out - exact) / exact).abs().max()
assert ((out - exact).abs() <= 6e-6 * exact.abs())[gate > -4].all(), ((out - exact) / exact).abs()[gate > -4].max()
gate = torch.tensor([0.0, 7.0, 20.0, 1e4, 1e20, 1e38, float("inf"), float("nan")])
for sign in (1, -1):  # PyTorch's GELU of -inf is NaN, here it is the limit
    out = torch.empty_like(gate)
    kernel[(1,)](sign * gate, out, N=8)
    expected = torch.nn.functional.relu(sign * gate)
    assert torch.allclose(out[:7], expected[:7], rtol=0, atol=1e-9) and out[7:].isnan().all(), out
"""

_INTERPRETED = """
from types import SimpleNamespace
import torch
from fvgen.kernels.linear_geglu import reference, spec, triton
from fvgen.kernels.linear_geglu.triton import Tiles
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=3)
for case in spec.FORWARD.cases:
    for dtype, allowed in ((torch.float32, 5e-6), (torch.float16, 1e-3)):
        args = case.make("cpu", dtype)
        calls = [lambda: triton.with_pointers(*args)]
        if all(a.numel() for a in args) and args[0].shape[-1] % 8 == 0 and dtype == torch.float16:
            tiles = ((64, 32, 32, 4, 3), (32, 64, 16, 4, 3), (64, 32, 32, 4, 3, 1))
            forms = [(*args, Tiles(*numbers), exact) for numbers in tiles for exact in (False, True)]
            calls += [lambda form=form: triton.with_descriptors(*form) for form in forms]
        expected = reference.linear_geglu(*args)
        for call in calls:
            found = call()
            assert found.shape == expected.shape and found.dtype == dtype, case.name
            assert not expected.numel() or (expected - found).abs().max() <= allowed * expected.abs().max(), case.name
"""


@pytest.mark.parametrize("text", [_GELU, _INTERPRETED], ids=["gelu", "operator"])
def test_kernels_in_the_interpreter(text, tmp_path):
    interpret(tmp_path, text)


def test_tiles_of_the_closest_number_of_rows(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from fvgen.kernels.linear_geglu import triton

    few, many = triton.Tiles(64, 64, 64, 4, 3), triton.Tiles(128, 128, 64, 8, 4)
    monkeypatch.setattr(triton, "MEASURED", {(640, 1280, 5120): few, (14400, 1280, 5120): many})
    assert triton.tiles_for(1280, 1280, 5120) == few
    assert triton.tiles_for(20000, 1280, 5120) == many
    assert triton.tiles_for(640, 320, 1280) == triton.DEFAULT


def test_measured_and_candidate_tiles_fit_a_multiprocessor():
    """Pipeline and output within 227 KiB, and accumulators within the registers."""
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from benchmarks.tune_linear_geglu import CANDIDATES
    from fvgen.kernels.linear_geglu import triton

    assert triton.DEFAULT in CANDIDATES
    for tiles in (*CANDIDATES, *triton.MEASURED.values()):
        pipeline = 2 * tiles.stages * (tiles.block_m + 2 * tiles.block_n) * tiles.block_k
        output = 2 * tiles.block_m * tiles.block_n
        kept = pipeline + output if tiles.persistent else max(pipeline, output)
        assert kept * max(tiles.persistent, 1) <= 232448 - 1024, tiles
        assert 2 * tiles.block_m * tiles.block_n <= 128 * 32 * tiles.warps, tiles


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "inner", "channels"),
    [(1, 8, 8), (130, 320, 1280), (640, 1280, 5120), (777, 72, 136), (300, 36, 50), (4099, 640, 2560)],
)
def test_half_precision_on_the_gpu(rows, inner, channels, dtype, monkeypatch):
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    args = layer((rows, inner), channels, dtype, "cuda")
    with poisoned_memory():
        found = linear_geglu(*args)
    assert_close(found, plain(*(t.double() for t in args)).to(dtype), 2 * torch.finfo(dtype).eps, "out")
    assert torch.equal(found, linear_geglu(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [8, 7], ids=["descriptors", "pointers"])
def test_an_infinite_gate_on_the_gpu(inner, dtype, monkeypatch):
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    x, weight, bias = layer((3, inner), 8, dtype, "cuda")
    bias[8] = torch.inf
    bias[9] = torch.nan
    found = linear_geglu(x, weight, bias)
    expected = plain(x, weight, bias)
    assert torch.equal(found[:, 0], expected[:, 0])
    assert found[:, 0].isinf().all()
    assert found[:, 1].isnan().all()
    assert found[:, 2:].isfinite().all()


@pytest.mark.gpu
def test_every_candidate_on_the_gpu():
    from benchmarks.tune_linear_geglu import CANDIDATES
    from fvgen.kernels.linear_geglu import triton

    args = layer((1300, 328), 648, torch.bfloat16, "cuda")
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the candidates are for sm_90")
    expected = plain(*(t.double() for t in args)).bfloat16()
    for tiles in CANDIDATES:
        with poisoned_memory():
            assert_close(triton.with_descriptors(*args, tiles), expected, 2**-7, str(tiles))


@pytest.mark.gpu
def test_captured_in_a_graph(monkeypatch):
    """Descriptors go into the graph with the addresses of capture time, so that a replay sees new contents."""
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    x, weight, bias = layer((300, 64), 128, torch.bfloat16, "cuda")
    linear_geglu(x, weight, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear_geglu(x, weight, bias)
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(out, linear_geglu(x, weight, bias))
