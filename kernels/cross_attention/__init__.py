"""Attention of one query to text tokens and, separately, to image tokens. Rules and roofline: README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from fvgen.kernels.cross_attention.spec import cross_attention_op

__all__ = ["cross_attention"]


def cross_attention(
    q: Tensor, text_kv: Tensor, image_kv: Tensor | None = None, *, scale: float | None = None, image_scale: float = 1.0
) -> Tensor:
    """``softmax(scale q k_t^T) v_t + image_scale softmax(scale q k_i^T) v_i``: ``[N, S, H, D]`` in the dtype of q.

    Args:
        q: ``[N, S, H, D]``, S queries with H heads of width D in N rows of a batch; float32, bfloat16 or float16. Heads wider
            than 128 take the slower path.
        text_kv: ``[M, L, 2, H, D]`` of the dtype of q (others on the slower path): keys and values of L tokens as one linear
            layer writes them. N is a multiple of M; row n sees the context ``n // (N / M)``.
        image_kv: ``[M', L', 2, H, D]`` likewise, with a softmax of its own; None leaves the branch out. q, text_kv and image_kv
            are differentiable.
        scale: of the logits, ``D ** -0.5`` if None.
        image_scale: weight of the image branch, a number. For a learnable one multiply the values in image_kv by it.

    Sources: attention (arXiv 1706.03762), image branch (arXiv 2308.06721), softmax in blocks and log-sum-exp kept for the
    backward pass (arXiv 2205.14135).

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: image_scale is a tensor.
    """
    if isinstance(image_scale, Tensor):
        raise TypeError("image_scale must be a number: multiply the values in image_kv by a learnable scale")
    if q.ndim != 4:
        raise ValueError(f"q must have shape [N, S, H, D], got {list(q.shape)}")
    for name, kv in (("text_kv", text_kv), ("image_kv", image_kv)):
        if kv is None:
            continue
        if kv.ndim != 5 or kv.shape[2:] != (2, *q.shape[2:]) or kv.shape[1] == 0:
            h, d = q.shape[2:]
            raise ValueError(f"{name} must have shape [M, L, 2, {h}, {d}] with L > 0, got {list(kv.shape)}")
        if kv.shape[0] == 0 or q.shape[0] % kv.shape[0]:
            raise ValueError(f"the {q.shape[0]} rows of q do not divide among the {kv.shape[0]} contexts of {name}")
    image = q.new_empty(0) if image_kv is None else image_kv.contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return cross_attention_op(q.contiguous(), text_kv.contiguous(), image, scale, image_scale)[0]
