"""Sum of two images with a border around it, in one pass over memory. Roofline: README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from fvgen.kernels.padded_sum.spec import padded_sum_op


def padded_sum(x: Tensor, residual: Tensor | None, fill: Tensor, before: int, after: int) -> Tensor:
    """``x + residual`` with ``before`` rows and columns of ``fill`` in front and ``after`` behind. Not differentiable.

    Args:
        x: ``[N, H, W, C]`` float32, bfloat16 or float16 (float64 on the slower path).
        residual: of the shape and dtype of x, or None.
        fill: ``[C]`` in the dtype of x.
        before, after: pixels, 0 or more.

    Returns:
        ``[N, before + H + after, before + W + after, C]``; summed in at least float32 and rounded once.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if x.ndim != 4 or fill.shape != x.shape[3:] or fill.dtype != x.dtype:
        raise ValueError(f"x must be [N, H, W, C] and fill [C] of its dtype, got {list(x.shape)} and {list(fill.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual must be like x, {x.dtype} {list(x.shape)}, got {residual.dtype} {list(residual.shape)}")
    if before < 0 or after < 0:
        raise ValueError(f"a border has 0 or more pixels, got {before} and {after}")
    added = x.new_empty(0) if residual is None else residual.contiguous()
    return padded_sum_op(x.contiguous(), added, fill.contiguous(), before, after)
