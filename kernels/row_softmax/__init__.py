"""Softmax of long rows in one pass over memory. Roofline: README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from fvgen.kernels.row_softmax.spec import row_softmax_op


def row_softmax(x: Tensor) -> Tensor:
    """``exp(x - max x) / sum exp(x - max x)`` along the last axis. Not differentiable.

    Args:
        x: ``[..., N]`` float32, bfloat16 or float16 with N up to 32768 (longer rows and float64 on the slower path); minus
            infinity leaves an entry out, but not all of a row.

    Returns:
        The shape and dtype of x; computed in at least float32 and rounded once.

    Raises:
        ValueError: x has no axis, or rows without entries.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have rows with entries, got shape {list(x.shape)}")
    return row_softmax_op(x.contiguous())
