"""Convolution over three frames at every site of a clip, channels last. Derivation and roofline: README.md beside this file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fvgen.kernels.temporal_conv.spec import temporal_conv_op, temporal_conv_statistics_op

__all__ = ["Measured", "pack", "temporal_conv", "temporal_conv_statistics"]


class Measured(NamedTuple):
    """What the convolution wrote, and statistics of it.

    Attributes:
        out: ``[B, T, S, O]`` in the dtype of x.
        partial: ``[B, ceil(T S / 128), 2, O]`` float32: for each block of 128 consecutive rows (t, s) of a clip the mean of every
            channel of ``out`` as it was rounded, and the sum of the squared deviations from it.
    """

    out: Tensor
    partial: Tensor


def pack(weight: Tensor) -> Tensor:
    """The ``[3, O, C]`` weight of :func:`temporal_conv`.

    Args:
        weight: ``[O, C, 3]``, or that of a ``Conv2d`` over (t, s) ``[O, C, 3, 1]`` or of a ``Conv3d`` ``[O, C, 3, 1, 1]``.

    Raises:
        ValueError: another shape.
    """
    if weight.ndim < 3 or weight.shape[2] != 3 or any(n != 1 for n in weight.shape[3:]):
        raise ValueError(f"weight must have shape [O, C, 3] or [O, C, 3, 1, ...], got {list(weight.shape)}")
    return weight.reshape(weight.shape[:3]).permute(2, 0, 1).contiguous()


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, residual: Tensor | None = None) -> Tensor:
    """``bias + residual[b, t, s] + sum_k weight[k] @ x[b, t + k - 1, s]`` with frames of zeros before and after the clip.

    Args:
        x: ``[B, T, S, C]`` for T frames of S sites, channels last; float32, bfloat16 or float16 (float64 on the slower path).
        weight: ``[3, O, C]``, see :func:`pack`.
        bias: ``[O]``.
        residual: ``[B, T, S, O]``. All have one dtype and are differentiable.

    Returns:
        ``[B, T, S, O]`` in the dtype of x; summed in at least float32 and rounded once.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    return temporal_conv_op(*_checked(x, weight, bias, residual))


def temporal_conv_statistics(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Measured:
    """:func:`temporal_conv` and, for the group normalisation after it, statistics of its output. Not differentiable.

    The statistics are laid out as the first pass of ``group_norm_silu`` with 128 rows per program leaves them.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    return Measured(*temporal_conv_statistics_op(*_checked(x, weight, bias, None)[:3]))


def _checked(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> list[Tensor]:
    """The operator's arguments: contiguous, an empty tensor for one that is left out."""
    if x.ndim != 4 or weight.ndim != 3 or weight.shape[::2] != (3, x.shape[3]):
        raise ValueError(f"x [B, T, S, C] and weight [3, O, C] are needed, got {list(x.shape)} and {list(weight.shape)}")
    channels = weight.shape[1]
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must have shape [{channels}], got {list(bias.shape)}")
    if residual is not None and residual.shape != (*x.shape[:3], channels):
        raise ValueError(f"residual must have shape {[*x.shape[:3], channels]}, got {list(residual.shape)}")
    tensors = [x.new_empty(0) if t is None else t.contiguous() for t in (x, weight, bias, residual)]
    if len({t.dtype for t in tensors}) > 1:
        raise ValueError(f"x, weight, bias and residual must have one dtype, got {', '.join(str(t.dtype) for t in tensors)}")
    return tensors
