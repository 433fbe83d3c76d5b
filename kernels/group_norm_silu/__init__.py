"""Group normalisation of channels-last data with SiLU, an added embedding and a residual. Rules: README.md beside this file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fvgen.kernels.group_norm_silu.spec import group_norm_silu_given_op, group_norm_silu_op, group_norm_silu_skip_op

__all__ = ["Normalised", "group_norm_silu", "group_norm_silu_given", "group_norm_silu_residual", "group_norm_silu_skip"]


class Normalised(NamedTuple):
    """Both ``[N, R, C]`` in the dtype of x.

    Attributes:
        out: the normalised sum.
        total: x + emb + residual, the next residual.
    """

    out: Tensor
    total: Tensor


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *, silu: bool = True, emb: Tensor | None = None
) -> Tensor:
    """``silu(group_norm(x + emb) * weight + bias)``, with statistics in float32 over all rows and the channels of a group.

    Args:
        x: ``[N, R, C]`` channels last: N frames of R = h w rows for statistics per frame, or N clips of R = t h w rows for joint
            ones. float32, bfloat16 or float16 (float64 on the slower path). Everything is differentiable.
        weight, bias: ``[C]``.
        groups: divides C.
        eps: added to the variance.
        silu: False leaves the activation out.
        emb: added to x first: ``[N, C]``, such as the time embedding between the convolutions of a residual block, or ``[C]``
            for all samples, such as a convolution's bias.

    Returns:
        ``[N, R, C]`` in the dtype of x.

    Sources: group normalisation (arXiv 1803.08494), SiLU (arXiv 1702.03118).

    Raises:
        ValueError: shapes that do not fit together.
    """
    return _call(x, None, weight, bias, groups, eps, silu, emb)[0]


def group_norm_silu_residual(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    emb: Tensor | None = None,
) -> Normalised:
    """:func:`group_norm_silu` of ``x + emb + residual``, which is returned too.

    Args:
        residual: of the shape and dtype of x, differentiable; the statistics are those of the sum as it is returned.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    return Normalised(*_call(x, residual, weight, bias, groups, eps, silu, emb))


def group_norm_silu_skip(
    x: Tensor,
    skip: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    emb: Tensor | None = None,
    residual: Tensor | None = None,
) -> Normalised:
    """:func:`group_norm_silu` of ``x + emb + residual`` and a skip connection side by side. Not differentiable.

    Args:
        x: ``[N, R, C]``.
        skip: ``[N, R, C']`` in the dtype of x.
        weight, bias: ``[C + C']``.
        groups: divides C + C'; a group may have channels of both.
        eps, silu: as there.
        emb: ``[N, C]`` or ``[C]``, added to x alone.
        residual: ``[N, R, C]`` in the dtype of x, added to x alone.

    Returns:
        Both ``[N, R, C + C']``; the statistics are those of the sum as it is returned.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if skip.ndim != 3 or skip.shape[:2] != x.shape[:2] or skip.dtype != x.dtype:
        raise ValueError(
            f"skip must have the rows and dtype of x, {x.dtype} {list(x.shape)}, got {skip.dtype} {list(skip.shape)}"
        )
    return Normalised(*_call(x, residual, weight, bias, groups, eps, silu, emb, skip))


def _call(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    emb: Tensor | None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"x must have shape [N, R, C] with R > 0, got {list(x.shape)}")
    n, _, own = x.shape
    channels = own if skip is None else own + skip.shape[2]
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual must be like x, {x.dtype} {list(x.shape)}, got {residual.dtype} {list(residual.shape)}")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"weight and bias must have shape [{channels}], got {list(weight.shape)} and {list(bias.shape)}")
    if emb is not None and emb.shape not in ((n, own), (own,)):
        raise ValueError(f"emb must have shape [{n}, {own}] or [{own}], got {list(emb.shape)}")
    x, residual, weight, bias, emb = (x.new_empty(0) if t is None else t.contiguous() for t in (x, residual, weight, bias, emb))
    if skip is not None:
        return group_norm_silu_skip_op(x, residual, skip.contiguous(), weight, bias, emb, groups, eps, silu)
    return group_norm_silu_op(x, residual, weight, bias, emb, groups, eps, silu)[:2]


def group_norm_silu_given(
    x: Tensor, partial: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *, silu: bool = True
) -> Tensor:
    """:func:`group_norm_silu` with statistics that whoever wrote x has taken on the way. Not differentiable.

    Args:
        x, weight, bias, groups, eps, silu: as there.
        partial: ``[N, ceil(R / 128), 2, C]`` float32: mean and sum of squared deviations of each channel in blocks of 128 rows.

    Raises:
        ValueError: shapes that do not fit together.
    """
    n, rows, channels = x.shape
    if channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"x {list(x.shape)} does not fit {groups} groups and weights of shape {list(weight.shape)}")
    if partial.shape != (n, -(-rows // 128), 2, channels):
        raise ValueError(f"partial must have shape {[n, -(-rows // 128), 2, channels]}, got {list(partial.shape)}")
    return group_norm_silu_given_op(x.contiguous(), partial, weight.contiguous(), bias.contiguous(), groups, eps, silu)
