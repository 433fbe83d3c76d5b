"""Layer normalisation of a residual sum. Rules and roofline: README.md beside this file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fvgen.kernels.layer_norm_residual.spec import layer_norm_residual_op

__all__ = ["Normalised", "layer_norm_residual"]


class Normalised(NamedTuple):
    """Both ``[..., C]`` in the dtype of x.

    Attributes:
        out: the normalised sum.
        total: x + residual, the next residual; x itself where no residual was given.
    """

    out: Tensor
    total: Tensor


def layer_norm_residual(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, eps: float = 1e-5
) -> Normalised:
    """``layer_norm(x + residual) * weight + bias`` over the last dimension, with statistics in float32.

    Args:
        x: ``[..., C]`` float32, bfloat16 or float16 (float64 on the slower path). Everything is differentiable.
        weight, bias: ``[C]`` of one dtype. More than 2048 channels run on the slower path.
        residual: of the shape and dtype of x, added first; the statistics are those of the sum as it is returned.
        eps: added to the variance.

    Sources: layer normalisation (arXiv 1607.06450).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    channels = x.shape[-1] if x.ndim else 0
    if channels == 0:
        raise ValueError(f"x must have shape [..., C] with C > 0, got {list(x.shape)}")
    if weight.shape != (channels,) or bias.shape != (channels,) or weight.dtype != bias.dtype:
        raise ValueError(
            f"weight and bias must be of one dtype and shape [{channels}], got {list(weight.shape)}, {list(bias.shape)}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual must be like x, {x.dtype} {list(x.shape)}, got {residual.dtype} {list(residual.shape)}")
    rows = x.reshape(-1, channels).contiguous()
    added = x.new_empty(0) if residual is None else residual.reshape(-1, channels).contiguous()
    out, total, *_ = layer_norm_residual_op(rows, added, weight.contiguous(), bias.contiguous(), eps)
    return Normalised(out.view(x.shape), x if residual is None else total.view(x.shape))
