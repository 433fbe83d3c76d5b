"""Group normalisation against torch.nn.functional, and the kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fvgen.kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_given,
    group_norm_silu_residual,
    group_norm_silu_skip,
)
from tests.processes import interpret

NAMES = ("x", "weight", "bias", "emb")
SHAPES = [(2, 1, 32, 8), (3, 7, 40, 5), (2, 130, 32, 8), (1, 1, 8, 1)]


def inputs(n: int, rows: int, channels: int) -> dict:
    random = torch.Generator().manual_seed(0)
    shapes = ((n, rows, channels), (channels,), (channels,), (n, channels))
    values = (torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes)
    return dict(zip(NAMES, values, strict=True))


def other(given: dict) -> torch.Tensor:
    """A residual for ``inputs``."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(given["x"].shape, generator=random, dtype=torch.float64).requires_grad_()


def with_emb(given: dict, emb: str) -> dict:
    chosen = {"none": None, "shared": given["emb"][0].detach().requires_grad_(), "each": given["emb"]}
    return {**given, "emb": chosen[emb]}


def plain(x, weight, bias, emb, groups, silu):
    rows = x if emb is None else x + emb.unsqueeze(-2)
    out = F.group_norm(rows.transpose(1, 2), groups, weight, bias, 1e-5)
    return (F.silu(out) if silu else out).transpose(1, 2)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("emb", ["none", "shared", "each"])
@pytest.mark.parametrize(("n", "rows", "channels", "groups"), SHAPES)
def test_equals_pytorch_in_float64(n, rows, channels, groups, emb, silu):
    given = with_emb(inputs(n, rows, channels), emb)
    expected = plain(**given, groups=groups, silu=silu)
    found = group_norm_silu(**given, groups=groups, silu=silu)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    wanted = {name: v for name, v in given.items() if v is not None}
    gradients = (torch.autograd.grad(out, list(wanted.values()), upstream) for out in (found, expected))
    for name, a, b in zip(wanted, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("emb", ["none", "shared", "each"])
@pytest.mark.parametrize(("n", "rows", "channels", "groups"), SHAPES)
def test_residual_equals_pytorch_in_float64(n, rows, channels, groups, emb, silu):
    given = with_emb(inputs(n, rows, channels), emb)
    residual = other(given)
    total = given["x"] + residual + (0 if given["emb"] is None else given["emb"].unsqueeze(-2))
    expected = plain(total, given["weight"], given["bias"], None, groups, silu), total
    found = group_norm_silu_residual(residual=residual, **given, groups=groups, silu=silu)
    upstream = torch.randn(2, *total.shape, dtype=torch.float64)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    wanted = {"residual": residual, **{name: v for name, v in given.items() if v is not None}}
    gradients = (torch.autograd.grad(outs, list(wanted.values()), list(upstream)) for outs in (found, expected))
    for name, a, b in zip(wanted, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"gradient of {name}: {m}")


@pytest.mark.parametrize("used", ["out", "total"])
def test_gradient_when_one_output_is_unused(used):
    given = inputs(2, 3, 8)
    residual = other(given)
    total = given["x"] + residual + given["emb"][:, None]
    expected = plain(total, given["weight"], given["bias"], None, 2, True) if used == "out" else total
    getattr(group_norm_silu_residual(residual=residual, **given, groups=2), used).square().sum().backward()
    for x in (given["x"], residual, given["emb"]):
        (gradient,) = torch.autograd.grad(expected.square().sum(), [x], retain_graph=True)
        torch.testing.assert_close(x.grad, gradient, rtol=1e-8, atol=1e-8)


def test_bfloat16_normalises_the_sum_that_it_returns():
    given = inputs(2, 9, 32)
    residual = other(given).detach().bfloat16()
    given = {name: v.detach().bfloat16() for name, v in given.items()}
    found = group_norm_silu_residual(residual=residual, **given, groups=8)
    assert torch.equal(found.out, group_norm_silu(found.total, given["weight"], given["bias"], 8))
    total = given["x"].float() + given["emb"].float()[:, None] + residual.float()
    assert torch.equal(found.total, total.bfloat16())


def test_channels_last_images_are_read_where_they_lie():
    images = torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last)
    rows = images.permute(0, 2, 3, 1).flatten(1, 2)
    assert rows.contiguous().data_ptr() == images.data_ptr()
    out = group_norm_silu(rows, torch.ones(8), torch.zeros(8), 2, silu=False)
    back = out.unflatten(1, (3, 5)).permute(0, 3, 1, 2)
    assert back.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(back, F.group_norm(images, 2))


def test_joint_and_per_frame_statistics_differ_by_the_shape_alone():
    given = inputs(4, 6, 8)
    frames = group_norm_silu(**given, groups=2)
    alone = group_norm_silu(**{k: v if k in ("weight", "bias") else v[2:3] for k, v in given.items()}, groups=2)
    torch.testing.assert_close(frames[2:3], alone)
    joint = group_norm_silu(given["x"].reshape(1, 24, 8), given["weight"], given["bias"], 2, silu=False)
    restored = (joint - given["bias"]) / given["weight"]
    torch.testing.assert_close(restored.unflatten(2, (2, 4)).mean((1, 3)), torch.zeros(1, 2, dtype=torch.float64))


def test_strided_input_and_other_parameter_dtypes():
    given = {name: v.detach() for name, v in inputs(2, 5, 8).items()}
    strided = given["x"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(group_norm_silu(**{**given, "x": strided}, groups=4), group_norm_silu(**given, groups=4))
    half = group_norm_silu(given["x"].bfloat16(), given["weight"].float(), given["bias"].float(), 4, emb=given["emb"])
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 8)}, "N, R, C"),
        ({"x": torch.zeros(2, 0, 8)}, "R > 0"),
        ({"groups": 3}, "groups"),
        ({"weight": torch.zeros(7)}, "weight"),
        ({"emb": torch.zeros(1, 8)}, "emb"),
        ({"emb": torch.zeros(7)}, "emb"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**inputs(2, 3, 8), "groups": 2, **change})


@pytest.mark.parametrize("residual", [torch.zeros(1, 3, 8, dtype=torch.float64), torch.zeros(2, 3, 8)])
def test_a_residual_unlike_x_is_an_error(residual):
    with pytest.raises(ValueError, match="residual"):
        group_norm_silu_residual(residual=residual, **inputs(2, 3, 8), groups=2)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("n", "rows", "channels", "groups"), [*SHAPES, (2, 300, 12, 3)])
def test_statistics_handed_over(n, rows, channels, groups, silu):
    given = {name: v.detach() for name, v in inputs(n, rows, channels).items()}
    blocks = given["x"].split(128, dim=1)
    partial = torch.stack([torch.stack([b.mean(1), b.var(1, correction=0) * b.shape[1]], 1) for b in blocks], 1)
    found = group_norm_silu_given(given["x"], partial, given["weight"], given["bias"], groups, silu=silu)
    expected = plain(**{**given, "emb": None}, groups=groups, silu=silu)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_statistics_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="partial"):
        group_norm_silu_given(torch.zeros(1, 130, 8), torch.zeros(1, 1, 2, 8), torch.ones(8), torch.zeros(8), 2)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("emb", ["none", "shared", "each"])
def test_a_skip_connection_beside_the_sum(emb, residual):
    own, further = inputs(3, 7, 8), inputs(3, 7, 12)
    given = {name: v if v is None else v.detach() for name, v in with_emb(own, emb).items()}
    skip = further["x"].detach().flip(1)
    weight, bias = (torch.cat([given[name], further[name].detach()]) for name in ("weight", "bias"))
    added = other(own).detach() if residual else None
    found = group_norm_silu_skip(given["x"], skip, weight, bias, 4, emb=given["emb"], residual=added)
    total = given["x"] + (0 if added is None else added) + (0 if given["emb"] is None else given["emb"].unsqueeze(-2))
    total = torch.cat([total, skip], 2)
    torch.testing.assert_close(found.total, total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.out, plain(total, weight, bias, None, 4, True), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": torch.zeros(2, 4, 4)}, "skip"),
        ({"skip": torch.zeros(2, 3, 4).double()}, "skip"),
        ({"weight": torch.zeros(8)}, "weight"),
        ({"groups": 5}, "groups"),
        ({"emb": torch.zeros(12)}, "emb"),
        ({"residual": torch.zeros(2, 3, 12)}, "residual"),
    ],
)
def test_a_skip_connection_that_does_not_fit_is_named(change, message):
    given = {"x": torch.zeros(2, 3, 8), "skip": torch.zeros(2, 3, 4), "weight": torch.ones(12), "bias": torch.ones(12)}
    with pytest.raises(ValueError, match=message):
        group_norm_silu_skip(**{**given, "groups": 2, **change})


_INTERPRETED = """
from functools import partial

import torch
from fvgen.kernels._testing import assert_close, largest_error, poisoned_memory
from fvgen.kernels.group_norm_silu import reference, spec, triton, triton_backward

def compare(fast, reference, args, what):
    with poisoned_memory():
        found = fast(*args)
    double = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    for name, f, e in zip("abcd", found, reference(*double)):
        assert_close(f, e.float(), 1e-5, f"{what} {name}")
    return found

def both(shape, groups, emb=2, residual=False, silu=True):
    args = spec._inputs("cpu", torch.float32, shape=shape, groups=groups, emb=emb, residual=residual, silu=silu)
    what = (shape, emb, residual, silu)
    out, total, mean, rstd = compare(triton.group_norm_silu, reference.group_norm_silu, args, what)
    after = torch.randn_like(total)
    given = (torch.randn_like(out), after, total if residual else args[0], *args[2:5], mean, rstd, groups, silu)
    compare(triton_backward.group_norm_silu_backward, reference.group_norm_silu_backward, given, (*what, "backward"))

both((1, 261, 72), 1)
both((1, 650, 132), 1, residual=True)
for case in spec.SKIP.cases:
    for most in (reference.SMALL, 0):
        fast = partial(triton.group_norm_silu_skip, single=triton.Single(most, 16))
        compare(fast, reference.group_norm_silu_skip, case.make("cpu", torch.float32), (case.name, most))

# cut up otherwise: unrolled, one tile a program, more blocks of rows than one step of the combination takes
Blocks, Joining = triton.Blocks, triton.Joining
for first, joined, last in (
    (Blocks(32, 16, 2, unroll=2, once=True), Joining(256, 4), Blocks(16, 16, 2, once=True)),
    (Blocks(64, 32, 4), Joining(128, 16), Blocks(64, 32, 8)),
):
    given = {"first": first, "joined": joined, "last": last, "single": triton.Single(0, 1)}
    for residual in (False, True):
        args = spec._inputs("cpu", torch.float32, shape=(2, 150, 72), groups=1, residual=residual)
        compare(partial(triton.group_norm_silu, **given), reference.group_norm_silu, args, (first, residual))
    args = spec._beside("cpu", torch.float32, shape=(2, 150, 64), further=72, groups=1, emb=1)
    compare(partial(triton.group_norm_silu_skip, **given), reference.group_norm_silu_skip, args, (first, "skip"))

half = spec._beside("cpu", torch.float16, shape=(1, 40, 64), further=56, groups=4, emb=1)
found, expected = triton.group_norm_silu_skip(*half)[1], reference.group_norm_silu_skip(*half)[1]
assert torch.equal(found, expected), "the sum is rounded once"

for small in (True, False):  # with and without the single pass
    triton.is_small = triton_backward.is_small = lambda rows, width, most=0, small=small: small
    for rows in (1, 7, 130):
        both((2, rows, 32), 8)
        both((2, rows, 40), 5, emb=0)
        both((1, rows, 40), 5, silu=False)
        both((3, rows, 40), 5, emb=1)
        both((3, rows, 40), 5, emb=1, residual=True)
        both((2, rows, 40), 5, residual=True, silu=False)
        both((1, rows, 32), 8, emb=0, residual=True)

    for shape, groups in (((2, 7, 32), 8), ((1, 263, 40), 5), ((2, 1031, 72), 1)):  # statistics handed over
        args = spec._given("cpu", torch.float32, shape=shape, groups=groups)
        assert_close(triton.group_norm_silu_given(*args), reference.group_norm_silu_given(*args), 1e-5, "given")

    # a large offset: no worse than 1.5 times PyTorch
    for residual in (False, True):
        x, *given = spec._inputs("cpu", torch.float32, shape=(2, 200, 40), groups=5, residual=residual, silu=False)
        tensors, rest = (x + 1000, *given[:4]), given[4:]
        exact = reference.group_norm_silu(*(t.double() for t in tensors), *rest)[0]
        mine = largest_error(triton.group_norm_silu(*tensors, *rest)[0], exact)
        assert mine <= 1.5 * largest_error(spec._library(*tensors, *rest)[0], exact), mine
"""


def test_kernels_in_the_interpreter(tmp_path):
    interpret(tmp_path, _INTERPRETED)


@pytest.mark.gpu
@pytest.mark.parametrize("number", [0, 2, 4])
def test_gradients_repeat_bit_by_bit(number, monkeypatch):
    from fvgen.kernels.group_norm_silu.spec import BACKWARD, group_norm_silu_backward_op

    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    args = BACKWARD.benchmarks[number].make("cuda", torch.bfloat16)
    first, second = (group_norm_silu_backward_op(*args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
