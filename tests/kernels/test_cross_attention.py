"""The formula against the model's own layer and PyTorch's attention and, through Triton's interpreter, the kernels themselves."""

from __future__ import annotations

import pytest
import torch

from fvgen.kernels.cross_attention import cross_attention, spec
from fvgen.models.attention import CrossAttention
from tests.processes import interpret

SHAPES = [
    {"shape": (4, 3, 2, 5), "text": (1, 7), "image": (4, 2)},
    {"shape": (6, 5, 3, 4), "text": (2, 1), "image": (3, 9)},
    {"shape": (2, 1, 1, 8), "text": (2, 3), "image": (1, 4)},
    {"shape": (3, 4, 2, 4), "text": (3, 6)},
]


def inputs(**shapes):
    """Queries, text and image keys and values in float64, and the scale of the image branch."""
    q, text, image, _, image_scale = spec._inputs("cpu", torch.float64, **shapes)
    return q, text, image if image.numel() else None, image_scale


def packed(layer: CrossAttention, context: torch.Tensor, branch: str = "") -> torch.Tensor:
    keys, values = (getattr(layer, f"to_{name}{branch}")(context) for name in "kv")
    return torch.stack([keys, values], 2).unflatten(3, (layer.heads, -1))


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("image_scale", [1.0, -0.3])
def test_equals_the_librarys_attention(shapes, image_scale):
    tensors = [t if t is None else t.requires_grad_() for t in inputs(**shapes)[:3]]
    found = cross_attention(*tensors, scale=0.4, image_scale=image_scale)
    q, text, image = tensors
    expected = spec._library_attention(q, text, q.new_empty(0) if image is None else image, 0.4, image_scale)
    torch.testing.assert_close(found, expected)
    given = [t for t in tensors if t is not None]
    upstream = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(out, given, upstream) for out in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(("text_rows", "image_rows"), [(1, 4), (4, 1), (2, 4), (1, None)])
def test_equals_the_models_layer(text_rows, image_rows, learnable):
    torch.manual_seed(0)
    layer = CrossAttention(6, 2, 4, 5, image_rows is not None, learnable).double()
    x, text = torch.randn(4, 3, 6).double(), torch.randn(text_rows, 7, 5).double()
    image = None if image_rows is None else torch.randn(image_rows, 9, 5).double()
    image_kv = None if image is None else packed(layer, image, "_image")
    if layer.image_scale is not None:
        torch.nn.init.constant_(layer.image_scale, 0.4)
        image_kv = torch.stack([image_kv[:, :, 0], (layer.image_scale.tanh() + 1) * image_kv[:, :, 1]], 2)
    out = cross_attention(layer.to_q(x).unflatten(2, (2, 4)), packed(layer, text), image_kv)
    torch.testing.assert_close(layer.to_out(out.flatten(2)), layer(x, text, image))


def test_rows_see_their_own_context():
    q, text, image, _ = inputs(shape=(6, 2, 1, 4), text=(2, 3), image=(3, 2))
    alone = cross_attention(q[4:5], text[1:2], image[2:3])
    torch.testing.assert_close(cross_attention(q, text, image)[4:5], alone)


def test_large_logits_stay_finite():
    tensors = [(100 * t.float()).requires_grad_() for t in inputs(**SHAPES[0])[:3]]
    out = cross_attention(*tensors)
    out.sum().backward()
    assert all(t.isfinite().all() for t in (out, *(t.grad for t in tensors)))


def test_strided_inputs():
    q, text, image, _ = inputs(**SHAPES[0])
    strided = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, text, image))
    torch.testing.assert_close(cross_attention(*strided), cross_attention(q, text, image))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, ValueError, "N, S, H, D"),
        ({"text_kv": torch.zeros(1, 7, 2, 5)}, ValueError, "text_kv"),
        ({"text_kv": torch.zeros(1, 0, 2, 2, 5)}, ValueError, "L > 0"),
        ({"image_kv": torch.zeros(4, 2, 2, 3, 5)}, ValueError, "image_kv"),
        ({"image_kv": torch.zeros(3, 2, 2, 2, 5)}, ValueError, "3 contexts"),
        ({"image_scale": torch.ones(())}, TypeError, "image_kv"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    q, text, image, _ = inputs(**SHAPES[0])
    with pytest.raises(error, match=message):
        cross_attention(**{"q": q, "text_kv": text, "image_kv": image, **change})


def test_reasons_for_the_slower_path():
    args = spec._inputs("cpu", torch.float32, **SHAPES[0])
    q, text, *rest = args
    assert spec.FORWARD.supports(*args) is None
    assert "another dtype" in spec.FORWARD.supports(q.bfloat16(), text, *rest)
    assert "float64" in spec.FORWARD.supports(*(a.double() if torch.is_tensor(a) else a for a in args))
    assert "width 129" in spec.FORWARD.supports(torch.zeros(1, 1, 1, 129), text, *rest)
    backward = spec._gradients("cpu", torch.float32, **SHAPES[0])
    assert spec.BACKWARD.supports(*backward) is None
    assert "contiguous" in spec.BACKWARD.supports(backward[0].transpose(0, 1), *backward[1:])


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched():
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from fvgen.kernels.cross_attention import triton

    for described in spec.SPECS:
        for kernel in described.kernels:
            c, dtype = kernel.constants, torch.bfloat16
            if kernel.name == "context_gradient_kernel":
                tile, warps = triton.context_options(dtype, c["TOKENS"], c["DIM"])
            else:
                chosen = triton.FORWARD if kernel.name == "cross_attention_kernel" else None
                tile, warps = triton.options(dtype, 2 * c["BLOCK_Q"], c["DIM"], chosen)
            assert ({**c, **tile}, warps) == (c, kernel.warps)


_INTERPRETED = """
import torch
from fvgen.kernels._testing import assert_close, poisoned_memory
from fvgen.kernels.cross_attention import reference, spec, triton

shapes = [
    {"shape": (4, 37, 2, 16), "text": (1, 77), "image": (4, 16), "image_scale": 0.5},
    {"shape": (6, 5, 3, 17), "text": (2, 33), "image": (3, 65)},  # rows of two text and three image contexts
    {"shape": (4, 9, 1, 8), "text": (2, 32), "image": (1, 1), "image_scale": -2.0},
    {"shape": (3, 1, 2, 40), "text": (1, 48)},
    {"shape": (1, 1, 1, 1), "text": (1, 1), "image": (1, 1)},
    {"shape": (0, 3, 2, 8), "text": (1, 4), "image": (1, 2)},
]

def check(given, what):
    for make, name in ((spec._inputs, "cross_attention"), (spec._gradients, "cross_attention_backward")):
        args = make("cpu", torch.float32, **given)
        with poisoned_memory():
            found = getattr(triton, name)(*args)
        for n, (a, e) in enumerate(zip(found, getattr(reference, name)(*args), strict=True)):
            assert_close(a, e, 1e-5, f"{name} {given} {what} output {n}")

for programs in (1, 256):  # with and without a loop over the queries of a context
    triton.PROGRAMS = programs
    for given in shapes:
        check(given, programs)

# the tiles of half precision
wide = torch.bfloat16
triton.options, triton.context_options = (
    lambda _, *rest, f=f: f(wide, *rest) for f in (triton.options, triton.context_options)
)
for given in shapes:
    check(given, "wide")
check({"shape": (2, 150, 1, 8), "text": (1, 70), "image": (1, 140)}, "wide")
"""


def test_kernels_in_the_interpreter(tmp_path):
    """Masks over queries, tokens and channels, in float32 (the interpreter's bfloat16 is not to be trusted)."""
    interpret(tmp_path, _INTERPRETED)
