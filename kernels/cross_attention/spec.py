"""Operator descriptions of the attention to text and image tokens and its backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.cross_attention import reference


def _inputs(
    device: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int, int],
    text: tuple[int, int],
    image: tuple[int, int] | None = None,
    image_scale: float = 1.0,
) -> tuple:
    """Arguments for q of a shape ``(N, S, H, D)`` and contexts of ``(rows, tokens)``."""
    random = torch.Generator().manual_seed(0)
    shapes = (shape, *((*given, 2, *shape[2:]) if given else (0,) for given in (text, image)))
    q, text_kv, image_kv = (torch.randn(s, generator=random, dtype=torch.float64).to(device, dtype) for s in shapes)
    return q, text_kv, image_kv, shape[3] ** -0.5, image_scale


def _gradients(device: str, dtype: torch.dtype, **shapes: Any) -> tuple:
    q, text_kv, image_kv, *scales = _inputs(device, dtype, **shapes)
    _, lse = reference.cross_attention(q, text_kv, image_kv, *scales)
    return q.flip(1).contiguous(), q, text_kv, image_kv, lse, *scales


def _fake(q: Tensor, text_kv: Tensor, image_kv: Tensor, scale: float, image_scale: float) -> tuple[Tensor, Tensor]:
    torch._check(q.ndim == 4, lambda: "q must have shape [N, S, H, D]")
    branches = reference.contexts(text_kv, image_kv)
    for kv in branches:
        fits = kv.ndim == 5 and kv.shape[2] == 2 and kv.shape[3:] == q.shape[2:]
        torch._check(fits, lambda: "keys and values must have shape [M, L, 2, H, D]")
        torch._check(q.shape[0] % kv.shape[0] == 0, lambda: "the rows of q must be a multiple of those of a context")
    lse = q.new_empty((len(branches), q.shape[2], *q.shape[:2]), dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q), lse


def _fake_backward(grad: Tensor, q: Tensor, text_kv: Tensor, image_kv: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (q, text_kv, image_kv))


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.scale, ctx.image_scale = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    return *cross_attention_backward_op(grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.image_scale), None, None


def _supports(q: Tensor, text_kv: Tensor, image_kv: Tensor, *_: object) -> str | None:
    if q.shape[3] > 128:
        return f"heads of width {q.shape[3]}, more than 128"
    if {text_kv.dtype, image_kv.dtype} != {q.dtype}:
        return f"a context of another dtype than q, {q.dtype}"
    return unsupported(q, text_kv, image_kv)


def _supports_backward(grad: Tensor, q: Tensor, text_kv: Tensor, image_kv: Tensor, lse: Tensor, *_: object) -> str | None:
    return _supports(q, text_kv, image_kv) or unsupported(grad) or unsupported(lse, dtypes=(torch.float32,))


def _products(q: Tensor, *contexts: Tensor) -> int:
    """Multiply-adds of one product of all queries with all keys they see."""
    return q.numel() * sum(kv.shape[1] for kv in reference.contexts(*contexts))


def _cost(q: Tensor, text_kv: Tensor, image_kv: Tensor, *_: object) -> Cost:
    elements = 2 * q.numel() + text_kv.numel() + image_kv.numel()
    return Cost(bytes=elements * q.element_size(), flops=4 * _products(q, text_kv, image_kv))


def _backward_cost(grad: Tensor, q: Tensor, text_kv: Tensor, image_kv: Tensor, *_: object) -> Cost:
    elements = 3 * q.numel() + 2 * (text_kv.numel() + image_kv.numel())
    return Cost(bytes=elements * q.element_size(), flops=10 * _products(q, text_kv, image_kv))


def _library_attention(q: Tensor, text_kv: Tensor, image_kv: Tensor, scale: float, image_scale: float) -> Tensor:
    """PyTorch's fused attention once for each context, on rows that share one laid end to end."""
    out = []
    for kv in reference.contexts(text_kv, image_kv):
        folded = q.reshape(kv.shape[0], -1, *q.shape[2:]).transpose(1, 2)
        k, v = (x.transpose(1, 2) for x in kv.unbind(2))
        out.append(F.scaled_dot_product_attention(folded, k, v, scale=scale).transpose(1, 2).reshape(q.shape))
    return out[0] if len(out) == 1 else torch.add(*out, alpha=image_scale)


_BENCHMARKS: dict[str, dict] = {
    "16x320x512": {"shape": (16, 2560, 5, 64), "image": (16, 16)},
    "16x320x512_inner": {"shape": (16, 640, 10, 64), "image": (16, 16)},
    "16x320x512_innermost": {"shape": (16, 40, 20, 64), "image": (16, 16)},
    "16x320x512_shared_image": {"shape": (16, 2560, 5, 64), "image": (1, 256)},
    "16x320x512_text": {"shape": (16, 2560, 5, 64)},
    "25x576x1024": {"shape": (25, 9216, 5, 64), "image": (25, 16)},
}
_BENCHMARKS = {name: {"text": (1, 77), **given} for name, given in _BENCHMARKS.items()}
_SMALL: dict[str, dict] = {
    "small": {"shape": (4, 3, 2, 3), "text": (1, 5), "image": (2, 3)},
    "text_only": {"shape": (2, 3, 1, 4), "text": (2, 4)},
    "scaled_image": {"shape": (3, 2, 2, 2), "text": (3, 1), "image": (1, 4), "image_scale": -0.7},
}
_ODD: dict[str, dict] = {
    "real_contexts": {"shape": (4, 37, 3, 64), "text": (1, 77), "image": (4, 16)},
    "shared_image": {"shape": (4, 70, 2, 40), "text": (2, 65), "image": (1, 256), "image_scale": 0.5},
    "padded": {"shape": (6, 5, 3, 17), "text": (2, 33), "image": (3, 130)},
    "widest": {"shape": (2, 9, 1, 128), "text": (1, 3)},
    "empty": {"shape": (0, 3, 2, 8), "text": (1, 4), "image": (1, 2)},
}
_TYPES = {
    **dict.fromkeys(("grad_ptr", "q_ptr", "text_ptr", "image_ptr", "kv_ptr", "out_ptr"), "*bf16"),
    **dict.fromkeys(("lse_ptr", "delta_ptr", "partial_ptr"), "*fp32"),
    **dict.fromkeys(("scale", "image_scale", "weight"), "fp32"),
    **dict.fromkeys(("per", "rows", "text_share", "image_share", "share", "chunks", "steps", "contexts"), "i32"),
}
_COMMON = {"HEADS": 5, "DIM": 64, "BLOCK_D": 64}
_SIZES = "per rows text_share image_share"


def _kernel(name: str, arguments: str, warps: int, constants: dict[str, int]) -> TritonKernel:
    signature = {n: _TYPES[n] for n in arguments.split()}
    return TritonKernel("cross_attention.triton", name, signature, {**_COMMON, **constants}, warps)


def _query_kernels(name: str, arguments: str, variants: tuple[tuple[int, int, int], ...]) -> tuple[TritonKernel, ...]:
    """Per variant: image tokens, queries of a program, tokens that they meet at a time."""
    return tuple(
        _kernel(name, arguments, block_q // 16, {"TEXT": 77, "IMAGE": image, "BLOCK_Q": block_q, "BLOCK_L": block_l})
        for image, block_q, block_l in variants
    )


FORWARD = OpSpec(
    name="cross_attention",
    schema="(Tensor q, Tensor text_kv, Tensor image_kv, float scale, float image_scale) -> (Tensor, Tensor)",
    reference=reference.cross_attention,
    fake=_fake,
    fast=launcher("cross_attention.triton", "cross_attention"),
    available=unavailable,
    supports=_supports,
    setup_context=_context,
    backward=_backward,
    grad_args=(0, 1, 2),
    cases=(
        *(Case(name, partial(_inputs, **given), gradcheck=True) for name, given in _SMALL.items()),
        *(Case(name, partial(_inputs, **given)) for name, given in _ODD.items()),
    ),
    benchmarks=tuple(Case(name, partial(_inputs, **given)) for name, given in _BENCHMARKS.items()),
    tolerance=Tolerance(forward=1e-5, backward=2e-5),
    cost=_cost,
    baselines={"eager": reference.cross_attention, "scaled_dot_product_attention": _library_attention},
    kernels=_query_kernels(
        "cross_attention_kernel",
        f"q_ptr text_ptr image_ptr out_ptr lse_ptr scale image_scale {_SIZES}",
        ((16, 64, 64), (256, 64, 64), (0, 64, 64)),
    ),
)
BACKWARD = OpSpec(
    name="cross_attention_backward",
    schema="(Tensor grad, Tensor q, Tensor text_kv, Tensor image_kv, Tensor lse, float scale, float image_scale)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.cross_attention_backward,
    fake=_fake_backward,
    fast=launcher("cross_attention.triton", "cross_attention_backward"),
    available=unavailable,
    supports=_supports_backward,
    cases=tuple(Case(name, partial(_gradients, **given)) for name, given in {**_SMALL, **_ODD}.items()),
    benchmarks=tuple(Case(name, partial(_gradients, **given)) for name, given in _BENCHMARKS.items()),
    tolerance=Tolerance(forward=2e-5),
    cost=_backward_cost,
    baselines={"eager": reference.cross_attention_backward},
    kernels=(
        *_query_kernels(
            "query_gradient_kernel",
            f"grad_ptr q_ptr text_ptr image_ptr lse_ptr delta_ptr out_ptr scale image_scale {_SIZES}",
            ((16, 128, 32), (256, 128, 32), (0, 128, 32), (16, 64, 32)),  # long and short sequences
        ),
        *(
            _kernel(
                "context_gradient_kernel",
                "grad_ptr q_ptr kv_ptr lse_ptr delta_ptr partial_ptr scale weight share rows chunks steps contexts",
                warps,
                {"TOKENS": tokens, "BLOCK_Q": 32, "BLOCK_L": block_l},
            )
            for tokens, block_l, warps in ((77, 128, 8), (16, 16, 4), (256, 128, 8))
        ),
    ),
)

cross_attention_backward_op = build_op(BACKWARD)
cross_attention_op = build_op(FORWARD)
SPECS = (FORWARD, BACKWARD)
