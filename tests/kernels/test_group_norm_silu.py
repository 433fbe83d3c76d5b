"""Group normalisation against torch.nn.functional, and the kernels in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fvgen.kernels.group_norm_silu import group_norm_silu

NAMES = ("x", "weight", "bias", "emb")
SHAPES = [(2, 1, 32, 8), (3, 7, 40, 5), (2, 130, 32, 8), (1, 1, 8, 1)]


def inputs(n: int, rows: int, channels: int) -> dict:
    random = torch.Generator().manual_seed(0)
    shapes = ((n, rows, channels), (channels,), (channels,), (n, channels))
    values = (torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes)
    return dict(zip(NAMES, values, strict=True))


def plain(x, weight, bias, emb, groups, silu):
    rows = x if emb is None else x + emb[:, None]
    out = F.group_norm(rows.transpose(1, 2), groups, weight, bias, 1e-5)
    return (F.silu(out) if silu else out).transpose(1, 2)


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("with_emb", [True, False])
@pytest.mark.parametrize(("n", "rows", "channels", "groups"), SHAPES)
def test_equals_pytorch_in_float64(n, rows, channels, groups, with_emb, silu):
    given = inputs(n, rows, channels)
    if not with_emb:
        given["emb"] = None
    expected = plain(**given, groups=groups, silu=silu)
    found = group_norm_silu(**given, groups=groups, silu=silu)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(expected)
    wanted = {name: v for name, v in given.items() if v is not None}
    gradients = (torch.autograd.grad(out, list(wanted.values()), upstream) for out in (found, expected))
    for name, a, b in zip(wanted, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"gradient of {name}: {m}")


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
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**{**inputs(2, 3, 8), "groups": 2, **change})


_INTERPRETED = """
import torch
from fvgen.kernels._testing import assert_close, largest_error, poisoned_memory
from fvgen.kernels.group_norm_silu import reference, spec, triton

def compare(fast, reference, args, what):
    with poisoned_memory():
        found = fast(*args)
    double = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
    for name, f, e in zip("abcd", found, reference(*double)):
        assert_close(f, e.float(), 1e-5, f"{what} {name}")
    return found

def both(shape, groups, emb, silu):
    args = spec._inputs("cpu", torch.float32, shape=shape, groups=groups, emb=emb, silu=silu)
    out, mean, rstd = compare(triton.group_norm_silu, reference.group_norm_silu, args, (shape, emb, silu))
    given = (torch.randn_like(out), *args[:4], mean, rstd, groups, silu)
    compare(triton.group_norm_silu_backward, reference.group_norm_silu_backward, given, (shape, emb, silu, "backward"))

both((1, 261, 72), 1, True, True)
both((1, 650, 132), 1, True, True)  # more blocks of rows than one step of the combination takes

for limit in (reference.SMALL, 0):  # with and without the single pass
    triton.is_small = lambda rows, width, limit=limit: rows * width <= limit
    for rows in (1, 7, 130):
        both((2, rows, 32), 8, True, True)
        both((2, rows, 40), 5, False, True)
        both((1, rows, 40), 5, True, False)

    # a large offset: no worse than 1.5 times PyTorch
    x, weight, bias, emb, *rest = spec._inputs("cpu", torch.float32, shape=(2, 200, 40), groups=5, silu=False)
    x = x + 1000
    exact = reference.group_norm_silu(*(t.double() for t in (x, weight, bias, emb)), *rest)[0]
    mine = largest_error(triton.group_norm_silu(x, weight, bias, emb, *rest)[0], exact)
    assert mine <= 1.5 * largest_error(spec._library(x, weight, bias, emb, *rest), exact), mine
"""


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", _INTERPRETED], env=env, capture_output=True, text=True, cwd=root / "tests")
    assert done.returncode == 0, done.stderr
