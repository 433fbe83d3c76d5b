"""The formula against the model's own layer and PyTorch's attention and, through Triton's interpreter, the kernels themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fvgen.kernels.temporal_attention import spec, temporal_attention
from fvgen.models.attention import SelfAttention
from tests.processes import interpret


def packed(b=2, t=5, s=3, h=2, d=4):
    return torch.randn(b, t, s, 3, h, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_librarys_attention(causal):
    qkv = packed()
    q, k, v = (x.permute(0, 2, 3, 1, 4) for x in qkv.unbind(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(temporal_attention(qkv, scale=0.3, causal=causal), expected)


@pytest.mark.parametrize("max_distance", [None, 2, 9])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_models_layer(causal, max_distance):
    """The UNet's temporal layer on the frames of every pixel, with the same weights."""
    b, t, s, h, d = 2, 5, 3, 2, 4
    torch.manual_seed(0)
    layer = SelfAttention(6, h, d, causal, max_distance).double()
    x = torch.randn(b, t, s, 6, dtype=torch.float64)
    expected = layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, s)).transpose(1, 2)
    weight = torch.cat([layer.to_q.weight, layer.to_k.weight, layer.to_v.weight])
    qkv = F.linear(x.flatten(0, 1), weight).view(b, t, s, 3, h, d)
    tables = {} if max_distance is None else {n: getattr(layer, n) for n in ("relative_key", "relative_value")}
    out = temporal_attention(qkv, causal=causal, **tables)
    torch.testing.assert_close(layer.to_out(out.flatten(3)), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("max_distance", [0, 1, 6])
def test_gradients_with_relative_positions(max_distance, causal):
    qkv = packed(1, 4, 2, 2, 3).requires_grad_()
    tables = torch.randn(2, 2 * max_distance + 1, 3, dtype=torch.float64).requires_grad_()

    def function(x, y):
        return temporal_attention(x, causal=causal, relative_key=y[0], relative_value=y[1])

    assert torch.autograd.gradcheck(function, (qkv, tables))


def test_causal_gradient_flows_to_the_past_only():
    qkv = packed().requires_grad_()
    temporal_attention(qkv, causal=True)[:, 2].sum().backward()
    assert (qkv.grad[:, 3:] == 0).all()
    assert (qkv.grad[:, :3] != 0).any()


def test_large_logits_stay_finite():
    qkv = (100 * packed().float()).requires_grad_()
    out = temporal_attention(qkv)
    out.sum().backward()
    assert out.isfinite().all()
    assert qkv.grad.isfinite().all()


def test_strided_inputs():
    qkv = packed().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(temporal_attention(qkv), temporal_attention(qkv.contiguous()))


def test_one_table_alone_is_an_error():
    with pytest.raises(ValueError, match="together"):
        temporal_attention(packed(), relative_key=torch.zeros(3, 4))


def test_reasons_for_the_slower_path():
    none, table = torch.empty(0), torch.zeros(3, 4)
    assert spec.FORWARD.supports(packed().float(), none, none, 1.0, False) is None
    assert spec.FORWARD.supports(packed().float(), table, table, 1.0, False) is None
    assert "two shapes" in spec.FORWARD.supports(packed().float(), table, torch.zeros(5, 4), 1.0, False)
    assert "relative" in spec.FORWARD.supports(packed(d=65).float(), torch.zeros(3, 65), torch.zeros(3, 65), 1.0, False)
    assert "relative" in spec.FORWARD.supports(packed(t=33).float(), table, table, 1.0, False)
    assert "float64" in spec.FORWARD.supports(packed(), none, none, 1.0, False)
    assert "65 frames" in spec.FORWARD.supports(packed(t=65).float(), none, none, 1.0, False)
    assert "width 129" in spec.FORWARD.supports(packed(d=129).float(), none, none, 1.0, False)
    assert "more than 64" in spec.FORWARD.supports(packed(t=33, d=65).float(), none, none, 1.0, False)
    args = spec.BACKWARD.cases[0].make("cpu", torch.float32)
    assert spec.BACKWARD.supports(*args) is None
    assert "contiguous" in spec.BACKWARD.supports(args[0].transpose(0, 1), *args[1:])


def test_kernels_are_compiled_ahead_of_time_as_they_are_launched():
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from fvgen.kernels.temporal_attention import triton

    for described in spec.SPECS:
        for kernel in described.kernels:
            c = kernel.constants
            backward = described is spec.BACKWARD
            found = triton.options(c["FRAMES"], c["HEADS"], c["DIM"], c["CAUSAL"], c["RELATIVE"], backward=backward)
            assert found == (c, kernel.warps)


_INTERPRETED = """
import torch
from fvgen.kernels._testing import assert_close, poisoned_memory
from fvgen.kernels.temporal_attention import reference, spec, triton
cases = [((1, t, 7, 3, 8), causal, None) for t in (1, 5, 16, 25) for causal in (False, True)]
cases += [((2, 16, 2, 1, 64), False, None), ((1, 3, 5, 2, 40), True, None), ((0, 4, 3, 2, 16), False, None)]
cases += [((1, t, 3, 2, 8), causal, m) for t in (1, 5, 16, 25) for m in (0, 1, t, t + 3) for causal in (False, True)]
cases += [((2, 17, 35, 1, 5), True, 3), ((1, 32, 1, 1, 64), False, 70), ((0, 4, 3, 2, 16), False, 2)]
for shape, causal, m in cases:
    for make, name in ((spec._inputs, "temporal_attention"), (spec._gradients, "temporal_attention_backward")):
        args = make("cpu", torch.float32, shape=shape, causal=causal, max_distance=m)
        with poisoned_memory():
            found = getattr(triton, name)(*args)
        for n, (a, e) in enumerate(zip(found, getattr(reference, name)(*args))):
            if e.numel() and name.endswith("backward") and n == 1 and 0 in (m, shape[1] - 1):
                # one row alone shifts all logits of a query, and so gets no gradient
                assert a.abs().max() < 1e-4 and e.abs().max() < 1e-4
                continue
            assert_close(a, e, 2e-6, f"{name} {shape} causal={causal} max_distance={m} output {n}")
"""


def test_kernels_in_the_interpreter(tmp_path):
    """Masks over frames, sites and channels, in float32 (the interpreter's bfloat16 is not to be trusted)."""
    interpret(tmp_path, _INTERPRETED)
