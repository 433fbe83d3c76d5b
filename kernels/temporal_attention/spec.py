"""Operator descriptions of the attention over frames and its backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.temporal_attention import reference

_DRAWN = 2**22  # distinct random numbers in an input; larger ones repeat them, since drawing on the CPU is slow


def _random(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> Tensor:
    count = torch.Size(shape).numel()
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn(min(count, _DRAWN), generator=random, dtype=torch.float64).to(device, dtype)
    return drawn.repeat(-(-count // max(1, len(drawn))))[:count].reshape(shape)


def _inputs(
    device: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int, int, int],
    causal: bool = False,
    max_distance: int | None = None,
) -> tuple:
    """Arguments for a shape ``(B, T, S, H, D)``, with relative positions unless ``max_distance`` is None."""
    b, t, s, h, d = shape
    qkv = _random((b, t, s, 3, h, d), device, dtype, 0)
    table = (0,) if max_distance is None else (2 * max_distance + 1, d)
    return qkv, *(_random(table, device, dtype, seed) for seed in (2, 3)), d**-0.5, causal


def _gradients(device: str, dtype: torch.dtype, *, shape: tuple[int, int, int, int, int], **which: Any) -> tuple:
    qkv, *rest = _inputs(device, dtype, shape=shape, **which)
    _, lse = reference.temporal_attention(qkv, *rest)
    return _random(shape, device, dtype, 1), qkv, lse, *rest


def _fake(qkv: Tensor, relative_key: Tensor, relative_value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    torch._check(qkv.ndim == 6 and qkv.shape[3] == 3, lambda: "qkv must have shape [B, T, S, 3, H, D]")
    b, t, s, _, h, d = qkv.shape
    for table in (relative_key, relative_value):
        if table.numel():
            fits = table.ndim == 2 and table.shape[0] % 2 == 1 and table.shape[1] == d
            torch._check(fits, lambda: "a relative-position table must have shape [2 m + 1, D]")
    lse = qkv.new_empty((b, h, s, t), dtype=torch.promote_types(qkv.dtype, torch.float32))
    return qkv.new_empty((b, t, s, h, d)), lse


def _fake_backward(grad: Tensor, qkv: Tensor, lse: Tensor, relative_key: Tensor, relative_value: Tensor, *_: object) -> tuple:
    return torch.empty_like(qkv), torch.empty_like(relative_key), torch.empty_like(relative_value)


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, relative_key, relative_value, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(qkv, output[1], relative_key, relative_value)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    return *temporal_attention_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.causal), None, None


def _supports(qkv: Tensor, relative_key: Tensor, relative_value: Tensor, scale: float, causal: bool) -> str | None:
    if qkv.shape[1] > 64:
        return f"{qkv.shape[1]} frames, more than 64"
    largest = 128 if qkv.shape[1] <= 32 else 64
    if qkv.shape[5] > largest:
        return f"heads of width {qkv.shape[5]}, more than {largest}"
    if relative_key.numel() or relative_value.numel():
        if relative_key.shape != relative_value.shape:
            return "relative-position tables of two shapes"
        if qkv.shape[1] > 32 or qkv.shape[5] > 64:
            return f"relative-position tables with {qkv.shape[1]} frames and heads of width {qkv.shape[5]}, more than 32 and 64"
    return unsupported(qkv, relative_key, relative_value)


def _supports_backward(grad: Tensor, qkv: Tensor, lse: Tensor, *rest: Any) -> str | None:
    return _supports(qkv, *rest) or unsupported(grad) or unsupported(lse, dtypes=(torch.float32,))


def _cost(qkv: Tensor, *_: object) -> Cost:
    per_part, rows = qkv.numel() // 3, qkv.numel() // 3 // max(1, qkv.shape[5])
    return Cost(bytes=4 * per_part * qkv.element_size() + 4 * rows, flops=4 * per_part * qkv.shape[1])


def _backward_cost(grad: Tensor, qkv: Tensor, *_: object) -> Cost:
    rows = grad.numel() // max(1, grad.shape[4])
    return Cost(bytes=7 * grad.numel() * grad.element_size() + 4 * rows, flops=10 * grad.numel() * grad.shape[1])


def _library_attention(qkv: Tensor, relative_key: Tensor, relative_value: Tensor, scale: float, causal: bool) -> Tensor:
    """PyTorch's fused attention on frames moved next to each other, in parts that fit its largest grid."""
    q, k, v = (x.permute(0, 2, 3, 1, 4).flatten(0, 1) for x in qkv.unbind(3))
    parts = zip(q.split(65535), k.split(65535), v.split(65535), strict=True)
    out = torch.cat([F.scaled_dot_product_attention(*part, is_causal=causal, scale=scale) for part in parts])
    return out.unflatten(0, (qkv.shape[0], -1)).permute(0, 3, 1, 2, 4).contiguous()


_forward_graphs = WeakTensorKeyDictionary()


def _library_backward(
    grad: Tensor, qkv: Tensor, lse: Tensor, relative_key: Tensor, relative_value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of PyTorch's fused attention; its forward pass is run once for each input and not part of later calls."""
    if qkv not in _forward_graphs:
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            _forward_graphs[qkv] = leaf, _library_attention(leaf, relative_key, relative_value, scale, causal)
    leaf, out = _forward_graphs[qkv]
    return torch.autograd.grad(out, leaf, grad, retain_graph=True)[0], relative_key, relative_value


_BENCHMARKS = {
    "16x320x512": (4, 16, 2560, 5, 64),
    "16x320x512_inner": (4, 16, 640, 10, 64),
    "25x576x1024": (2, 25, 9216, 5, 64),
    "25x576x1024_inner": (2, 25, 2304, 10, 64),
}
_CASES: dict[str, tuple[tuple[int, int, int, int, int], bool, int | None]] = {
    "small": ((2, 3, 2, 2, 4), False, None),
    "causal": ((1, 5, 2, 2, 3), True, None),
    "one_frame": ((2, 1, 3, 1, 8), False, None),
    "sites_left_over": ((1, 16, 7, 3, 64), False, None),
    "padded_frames": ((2, 25, 5, 3, 40), True, None),
    "most_frames": ((1, 64, 2, 1, 64), False, None),
    "widest": ((1, 18, 2, 1, 128), True, None),
    "empty": ((2, 4, 0, 2, 16), False, None),
    "relative": ((1, 3, 2, 2, 4), False, 1),
    "relative_causal": ((1, 3, 2, 1, 3), True, 4),
    "relative_padded": ((2, 25, 37, 3, 40), True, 8),
    "relative_most_frames": ((1, 32, 2, 1, 64), False, 70),
    "relative_empty": ((2, 4, 0, 2, 16), False, 2),
}
_SMOOTH = ("small", "causal", "one_frame", "relative", "relative_causal")
_TYPES = {
    **dict.fromkeys(("grad_ptr", "qkv_ptr", "key_ptr", "value_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("lse_ptr", "key_out_ptr", "value_out_ptr"), "*fp32"),
    "scale": "fp32",
    "sites": "i32",
}


def _kernels(
    name: str, arguments: str, sites: int, variants: dict[tuple[int, bool, int | None], int]
) -> tuple[TritonKernel, ...]:
    """``variants``: frames, causal and largest distance in the tables -> warps; ``sites``: per program, with tables."""
    signature = {n: _TYPES[n] for n in arguments.split()}
    return tuple(
        TritonKernel(
            "temporal_attention.triton",
            name,
            signature,
            {
                **{"FRAMES": t, "HEADS": 5, "DIM": 64, "CAUSAL": causal, "RELATIVE": relative},
                **{"SITES": 4 if relative is None else sites, "BLOCK_T": {16: 16, 25: 32, 32: 32, 64: 64}[t], "BLOCK_D": 64},
                "BLOCK_R": 0 if relative is None else {1: 16, 8: 32, 15: 32, 31: 64}[relative],
            },
            warps,
        )
        for (t, causal, relative), warps in variants.items()
    )


FORWARD = OpSpec(
    name="temporal_attention",
    schema="(Tensor qkv, Tensor relative_key, Tensor relative_value, float scale, bool causal) -> (Tensor, Tensor)",
    reference=reference.temporal_attention,
    fake=_fake,
    fast=launcher("temporal_attention.triton", "temporal_attention"),
    available=unavailable,
    supports=_supports,
    setup_context=_context,
    backward=_backward,
    grad_args=(0, 1, 2),
    cases=tuple(
        Case(name, partial(_inputs, shape=shape, causal=causal, max_distance=m), gradcheck=name in _SMOOTH)
        for name, (shape, causal, m) in _CASES.items()
    ),
    benchmarks=tuple(Case(name, partial(_inputs, shape=shape)) for name, shape in _BENCHMARKS.items()),
    tolerance=Tolerance(forward=2e-5, backward=2e-5),
    cost=_cost,
    baselines={"eager": reference.temporal_attention, "scaled_dot_product_attention": _library_attention},
    kernels=_kernels(
        "temporal_attention_kernel",
        "qkv_ptr key_ptr value_ptr out_ptr lse_ptr scale sites",
        4,
        {
            **{(16, False, None): 1, (25, False, None): 2, (25, True, None): 2, (64, False, None): 8},
            **{(16, False, 1): 2, (16, True, 15): 4, (25, False, 8): 4, (32, True, 31): 8},
        },
    ),
)
BACKWARD = OpSpec(
    name="temporal_attention_backward",
    schema="(Tensor grad, Tensor qkv, Tensor lse, Tensor relative_key, Tensor relative_value, float scale, bool causal)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.temporal_attention_backward,
    fake=_fake_backward,
    fast=launcher("temporal_attention.triton", "temporal_attention_backward"),
    available=unavailable,
    supports=_supports_backward,
    cases=tuple(
        Case(name, partial(_gradients, shape=shape, causal=causal, max_distance=m)) for name, (shape, causal, m) in _CASES.items()
    ),
    benchmarks=tuple(Case(name, partial(_gradients, shape=shape)) for name, shape in _BENCHMARKS.items()),
    tolerance=Tolerance(forward=2e-5),
    cost=_backward_cost,
    baselines={"eager": reference.temporal_attention_backward, "scaled_dot_product_attention": _library_backward},
    kernels=_kernels(
        "temporal_attention_backward_kernel",
        "grad_ptr qkv_ptr lse_ptr key_ptr value_ptr out_ptr key_out_ptr value_out_ptr scale sites",
        32,
        {
            **{(16, False, None): 1, (25, False, None): 4, (25, True, None): 4, (64, False, None): 8},
            **{(16, False, 1): 2, (16, True, 15): 8, (25, False, 8): 8, (32, True, 31): 8},
        },
    ),
)

temporal_attention_backward_op = build_op(BACKWARD)
temporal_attention_op = build_op(FORWARD)
SPECS = (FORWARD, BACKWARD)
