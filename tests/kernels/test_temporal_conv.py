"""The temporal convolution against PyTorch's own and autograd, its conventions, and the kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fvgen.kernels._testing import assert_close
from fvgen.kernels.temporal_conv import pack, reference, temporal_conv, temporal_conv_statistics
from tests.processes import interpret

NAMES = ("x", "weight", "bias", "residual")
SHAPES = [(1, 1, 3, 2, 4), (2, 2, 5, 3, 2), (3, 7, 4, 5, 6)]


def inputs(clips: int, frames: int, sites: int, inner: int, channels: int) -> dict[str, torch.Tensor]:
    """float64 and with gradients; the weight as a ``Conv3d`` has it."""
    random = torch.Generator().manual_seed(0)
    shapes = ((clips, frames, sites, inner), (channels, inner, 3, 1, 1), (channels,), (clips, frames, sites, channels))
    values = (torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes)
    return dict(zip(NAMES, values, strict=True))


def plain(x, weight, bias=None, residual=None):
    out = functional.conv3d(x.permute(0, 3, 1, 2)[..., None], weight, bias, padding=(1, 0, 0))[..., 0].permute(0, 2, 3, 1)
    return out if residual is None else out + residual


@pytest.mark.parametrize("given", [("bias", "residual"), ("bias",), ("residual",), ()], ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_conv3d_in_float64(shape, given):
    chosen = {name: value for name, value in inputs(*shape).items() if name in ("x", "weight", *given)}
    expected = plain(**chosen)
    found = temporal_conv(**{**chosen, "weight": pack(chosen["weight"])})
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad(out, list(chosen.values()), upstream) for out in (found, expected))
    for name, a, b in zip(chosen, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"gradient of {name}: {m}")


def test_clips_do_not_see_one_another():
    given = inputs(3, 4, 5, 2, 3)
    x, weight = given["x"].detach(), pack(given["weight"].detach())
    alone = torch.cat([temporal_conv(clip[None], weight) for clip in x])
    torch.testing.assert_close(temporal_conv(x, weight), alone, rtol=1e-12, atol=1e-12)


def test_taps_run_forwards_in_time():
    x = torch.zeros(1, 5, 1, 1)
    x[0, 2] = 1
    weight = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    assert temporal_conv(x, weight).flatten().tolist() == [0, 3, 2, 1, 0]


@pytest.mark.parametrize("ones", [(), (1,), (1, 1)])
def test_pack_takes_the_weight_of_any_convolution(ones):
    weight = torch.randn(4, 5, 3, *ones)
    packed = pack(weight)
    assert packed.shape == (3, 4, 5)
    assert packed.is_contiguous()
    assert torch.equal(packed[2], weight[:, :, 2].flatten(1))


def test_equals_the_convolution_of_the_model():
    conv = torch.nn.Conv2d(6, 6, (3, 1), padding=(1, 0))
    x = torch.randn(2, 5, 7, 6)
    expected = conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(temporal_conv(x, pack(conv.weight), conv.bias), expected)
    torch.testing.assert_close(reference.cudnn(x, pack(conv.weight.detach()), conv.bias, x.new_empty(0)), expected)


def test_bfloat16_is_rounded_once():
    given = {name: value.detach().bfloat16() for name, value in inputs(1, 4, 6, 20, 8).items()}
    found = temporal_conv(**{**given, "weight": pack(given["weight"])})
    assert torch.equal(found, plain(*(t.double() for t in given.values())).bfloat16())


def test_a_residual_of_another_layout_is_copied():
    given = {name: value.detach() for name, value in inputs(2, 3, 4, 5, 6).items()}
    weight = pack(given.pop("weight"))
    strided = {name: t.transpose(-1, 0).contiguous().transpose(-1, 0) for name, t in given.items()}
    assert torch.equal(temporal_conv(weight=weight, **strided), temporal_conv(weight=weight, **given))


@pytest.mark.parametrize(("frames", "sites"), [(2, 128), (3, 50), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_statistics_are_those_of_the_rounded_output(frames, sites, dtype):
    given = {name: value.detach().to(dtype) for name, value in inputs(2, frames, sites, 3, 4).items()}
    weight = pack(given["weight"])
    out, partial = temporal_conv_statistics(given["x"], weight, given["bias"])
    assert torch.equal(out, temporal_conv(given["x"], weight, given["bias"]))
    assert partial.shape == (2, -(-frames * sites // 128), 2, 4)
    for i, block in enumerate(out.flatten(1, 2).double().split(128, 1)):
        torch.testing.assert_close(partial[:, i, 0].double(), block.mean(1), rtol=1e-5, atol=1e-6)
        squares = (block - block.mean(1, keepdim=True)).square().sum(1)
        torch.testing.assert_close(partial[:, i, 1].double(), squares, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, "B, T, S, C"),
        ({"weight": torch.zeros(2, 4, 8)}, "3, O, C"),
        ({"weight": torch.zeros(3, 4, 7)}, "3, O, C"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"residual": torch.zeros(2, 3, 5, 8)}, "residual"),
        ({"bias": torch.zeros(4).double()}, "dtype"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"x": torch.zeros(2, 3, 5, 8), "weight": torch.zeros(3, 4, 8), **change}
    with pytest.raises(ValueError, match=message):
        temporal_conv(**given)


def test_a_weight_of_another_extent_is_named():
    for shape in ((4, 5), (4, 5, 2), (4, 5, 3, 3)):
        with pytest.raises(ValueError, match="weight"):
            pack(torch.zeros(shape))
    with pytest.raises(RuntimeError, match="weight"):
        torch.ops.fvgen.temporal_conv(*(torch.empty(s, device="meta") for s in ((1, 2, 3, 4), (2, 4, 4), (0,), (0,))))


def test_every_shape_of_the_network_has_tiles():
    triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from fvgen.kernels.temporal_conv.spec import _CLIPS
    from fvgen.kernels.temporal_conv.triton import tiles_for

    for given in _CLIPS.values():
        clips, frames, sites, inner = given["shape"]
        for statistics in (False, True):
            tiles = tiles_for(clips, frames * sites, inner, inner, statistics)
            assert not statistics or tiles.block_m % reference.ROWS == 0
            assert all(n == triton.next_power_of_2(n) for n in (tiles.block_m, tiles.block_n, tiles.block_k))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("clips", "frames", "sites", "inner", "channels"), [(1, 16, 40, 64, 64), (2, 3, 300, 40, 328), (3, 1, 9, 8, 8)]
)
def test_half_precision_on_the_gpu(clips, frames, sites, inner, channels, monkeypatch):
    """The contract tests run in float32, which never takes the descriptors."""
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    given = {name: v.detach().bfloat16() for name, v in inputs(clips, frames, sites, inner, channels).items()}
    given["weight"] = pack(given["weight"]) / inner**0.5
    wide = {name: t.double() for name, t in given.items()}
    found = temporal_conv(**{name: t.cuda() for name, t in given.items()})
    assert_close(found.float(), temporal_conv(**wide).float(), 5e-3, "output")
    del given["residual"], wide["residual"]
    measured = temporal_conv_statistics(**{name: t.cuda() for name, t in given.items()})
    assert_close(measured.out.float(), temporal_conv(**wide).float(), 5e-3, "output with statistics")
    rows = measured.out.double().flatten(1, 2)
    for i, block in enumerate(rows.split(128, 1)):
        assert_close(measured.partial[:, i, 0].double(), block.mean(1), 1e-5, "mean")
        squares = (block - block.mean(1, keepdim=True)).square().sum(1)
        assert_close(measured.partial[:, i, 1].double(), squares, 1e-5, "squared deviations")


_INTERPRETED = """
from types import SimpleNamespace

import torch
from fvgen.kernels._testing import assert_close, poisoned_memory
from fvgen.kernels.temporal_conv import reference, spec, triton

def compare(found_by, expected_by, args, allowed, what):
    with poisoned_memory():
        found = found_by(*args)
    expected = expected_by(*args)
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else zip(found, expected)
    for n, (a, e) in enumerate(pairs):
        assert_close(a, e, allowed, f"{what} output {n}")

for op in spec.SPECS:
    for case in op.cases:
        for dtype, allowed in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
            found_by = getattr(triton, op.name)
            triton.descriptors_fit = lambda *_: False
            compare(found_by, op.reference, case.make("cpu", dtype), allowed, f"{op.name} {case.name} {dtype}")

# the descriptor kernel: shapes that TMA takes, with every form of tile
T = triton.Tiles
torch.cuda.get_device_properties = lambda _: SimpleNamespace(multi_processor_count=2)
for shape, channels, tiles in (
    ((2, 3, 128, 40), 48, T(128, 32, 0, 32, 8, 3)),
    ((2, 3, 50, 24), 40, T(64, 32, 16, 16, 4, 3)),
    ((1, 5, 70, 16), 72, T(256, 32, 16, 16, 8, 3, 0, 2)),
    ((3, 2, 9, 24), 16, T(16, 16, 0, 16, 4, 3)),
    ((1, 1, 40, 8), 8, T(32, 16, 0, 16, 4, 3)),
    ((2, 3, 50, 24), 40, T(128, 16, 16, 16, 4, 3, 2)),
):
    for given in ({}, {"bias": False}, {"residual": True}):
        args = spec._inputs("cpu", torch.float16, shape=shape, channels=channels, **given)
        compare(lambda *a: triton.with_descriptors(*a, tiles), reference.temporal_conv, args, 2e-3, (shape, tiles, given))
    if tiles.block_m % 128 == 0:
        partial = torch.full((shape[0], -(-shape[1] * shape[2] // 128), 2, channels), float("nan"))
        args = spec._inputs("cpu", torch.float16, shape=shape, channels=channels)
        found = triton.with_descriptors(*args, tiles, partial)
        expected = reference.temporal_conv_statistics(*args[:3])
        assert_close(found, expected[0], 2e-3, "output")
        assert_close(partial, expected[1], 2e-3, "statistics")
"""


def test_kernels_in_the_interpreter(tmp_path):
    interpret(tmp_path, _INTERPRETED)
