"""Attention over the frames of every site, on packed queries, keys and values. Rules and roofline: README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from fvgen.kernels.temporal_attention.spec import temporal_attention_op


def temporal_attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    relative_key: Tensor | None = None,
    relative_value: Tensor | None = None,
) -> Tensor:
    """Softmax attention in which a site attends to itself in all frames: ``[B, T, S, H, D]`` in the dtype of ``qkv``.

    Args:
        qkv: ``[B, T, S, 3, H, D]`` for T frames, S sites, H heads of width D, as a linear layer on ``[B T, S, C]`` writes them;
            float32, bfloat16 or float16; differentiable. More than 64 frames (32 with tables), or heads wider than 64 (128 for
            T <= 32 without tables), take the slower path.
        scale: of the logits, ``D ** -0.5`` if None.
        causal: a frame sees itself and earlier ones only.
        relative_key, relative_value: both or neither, ``[2 m + 1, D]``: row ``clamp(key - query, -m, m) + m`` is added to the key
            and to the value; differentiable.

    Sources: attention (arXiv 1706.03762), relative positions (arXiv 1803.02155), log-sum-exp kept for the backward pass
    (arXiv 2205.14135).

    Raises:
        ValueError: one table without the other.
        RuntimeError: shapes that do not fit together.
    """
    if (relative_key is None) != (relative_value is None):
        raise ValueError("relative_key and relative_value come together or not at all")
    if relative_key is None or relative_value is None:
        relative_key = relative_value = qkv.new_empty(0)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    return temporal_attention_op(qkv.contiguous(), relative_key.contiguous(), relative_value.contiguous(), scale, causal)[0]
