"""Attention over frames in plain PyTorch; b sample, t query frame, l key frame, s site, h head, d channel."""

from __future__ import annotations

import torch
from torch import Tensor


def _distance(qkv: Tensor) -> Tensor:
    position = torch.arange(qkv.shape[1], device=qkv.device)
    return position[None, :] - position[:, None]  # key - query


def _rows(qkv: Tensor, table: Tensor) -> Tensor:
    """Row of a relative-position table for every (query, key)."""
    largest = table.shape[0] // 2
    return _distance(qkv).clamp(-largest, largest) + largest


def _logits(qkv: Tensor, relative_key: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values in the compute dtype, and logits [B, H, S, T, T]."""
    q, k, v = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).unbind(3)
    logits = torch.einsum("btshd,blshd->bhstl", q, k)
    if relative_key.numel():
        logits = logits + torch.einsum("btshd,tld->bhstl", q, relative_key.to(q.dtype)[_rows(qkv, relative_key)])
    logits = logits * scale
    return q, k, v, logits.masked_fill(_distance(qkv) > 0, float("-inf")) if causal else logits


def temporal_attention(
    qkv: Tensor, relative_key: Tensor, relative_value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    _, _, v, logits = _logits(qkv, relative_key, scale, causal)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp()
    out = torch.einsum("bhstl,blshd->btshd", weights, v)
    if relative_value.numel():
        rows = relative_value.to(v.dtype)[_rows(qkv, relative_value)]
        out = out + torch.einsum("bhstl,tld->btshd", weights, rows)
    return out.to(qkv.dtype).contiguous(), lse.contiguous()


def temporal_attention_backward(
    grad: Tensor, qkv: Tensor, lse: Tensor, relative_key: Tensor, relative_value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, logits = _logits(qkv, relative_key, scale, causal)
    g = grad.to(q.dtype)
    weights = (logits - lse[..., None]).exp()
    grad_weights = torch.einsum("btshd,blshd->bhstl", g, v)
    grad_value = torch.zeros_like(relative_value)
    if relative_value.numel():
        rows = _rows(qkv, relative_value)
        grad_weights = grad_weights + torch.einsum("btshd,tld->bhstl", g, relative_value.to(q.dtype)[rows])
        pairs = torch.einsum("bhstl,btshd->tld", weights, g)
        total = torch.zeros_like(relative_value, dtype=q.dtype).index_add(0, rows.flatten(), pairs.flatten(0, 1))
        grad_value = total.to(relative_value.dtype)
    # The row sum of weights * grad_weights equals that of grad * out, so that the output need not be kept.
    grad_logits = scale * weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    dq = torch.einsum("bhstl,blshd->btshd", grad_logits, k)
    grad_key = torch.zeros_like(relative_key)
    if relative_key.numel():
        rows = _rows(qkv, relative_key)
        dq = dq + torch.einsum("bhstl,tld->btshd", grad_logits, relative_key.to(q.dtype)[rows])
        pairs = torch.einsum("bhstl,btshd->tld", grad_logits, q)
        total = torch.zeros_like(relative_key, dtype=q.dtype).index_add(0, rows.flatten(), pairs.flatten(0, 1))
        grad_key = total.to(relative_key.dtype)
    dk = torch.einsum("bhstl,btshd->blshd", grad_logits, q)
    dv = torch.einsum("bhstl,btshd->blshd", weights, g)
    return torch.stack([dq, dk, dv], 3).to(qkv.dtype), grad_key, grad_value
