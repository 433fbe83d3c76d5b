"""Attention to text and image tokens in plain PyTorch; m context, s query of that context, l token, h head, d channel."""

from __future__ import annotations

import torch
from torch import Tensor


def contexts(text_kv: Tensor, image_kv: Tensor) -> tuple[Tensor, ...]:
    """The contexts that are there: text, and image unless it is empty."""
    return (text_kv, image_kv) if image_kv.numel() else (text_kv,)


def _fold(x: Tensor, kv: Tensor) -> Tensor:
    """``[N, S, H, D]`` -> ``[M, N / M S, H, D]`` in the compute dtype: rows that share a context, laid end to end."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x.reshape(kv.shape[0], x.shape[0] // kv.shape[0] * x.shape[1], *x.shape[2:])


def cross_attention(q: Tensor, text_kv: Tensor, image_kv: Tensor, scale: float, image_scale: float) -> tuple[Tensor, Tensor]:
    out, sums = 0, []
    for kv, weight in zip(contexts(text_kv, image_kv), (1, image_scale), strict=False):
        folded = _fold(q, kv)
        k, v = kv.to(folded.dtype).unbind(2)
        logits = torch.einsum("mshd,mlhd->mhsl", folded, k) * scale
        lse = logits.logsumexp(-1)
        seen = torch.einsum("mhsl,mlhd->mshd", (logits - lse[..., None]).exp(), v)
        out = out + weight * seen.reshape(q.shape)
        sums.append(lse.transpose(0, 1).reshape(q.shape[2], *q.shape[:2]))
    return out.to(q.dtype).contiguous(), torch.stack(sums)


def cross_attention_backward(
    grad: Tensor, q: Tensor, text_kv: Tensor, image_kv: Tensor, lse: Tensor, scale: float, image_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, grads = 0, []
    for kv, weight, sums in zip(contexts(text_kv, image_kv), (1, image_scale), lse, strict=False):
        folded, g = _fold(q, kv), weight * _fold(grad, kv)
        k, v = kv.to(folded.dtype).unbind(2)
        sums = sums.reshape(q.shape[2], kv.shape[0], -1 if q.shape[0] else 0).transpose(0, 1)
        weights = (torch.einsum("mshd,mlhd->mhsl", folded, k) * scale - sums[..., None]).exp()
        grad_weights = torch.einsum("mshd,mlhd->mhsl", g, v)
        # The row sum of weights * grad_weights equals that of grad * out of this branch, so that the output need not be kept.
        grad_logits = scale * weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        dq = dq + torch.einsum("mhsl,mlhd->mshd", grad_logits, k).reshape(q.shape)
        dk = torch.einsum("mhsl,mshd->mlhd", grad_logits, folded)
        dv = torch.einsum("mhsl,mshd->mlhd", weights, g)
        grads.append(torch.stack([dk, dv], 2).to(kv.dtype))
    if not image_kv.numel():
        grads.append(torch.zeros_like(image_kv))
    return dq.to(q.dtype).contiguous(), *grads
