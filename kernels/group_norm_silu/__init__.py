"""Group normalisation of channels-last data with SiLU and an added embedding. Rules and roofline: README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from fvgen.kernels.group_norm_silu.spec import group_norm_silu_op

__all__ = ["group_norm_silu"]


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
        emb: ``[N, C]`` added to x first, such as the time embedding between the convolutions of a residual block.

    Returns:
        ``[N, R, C]`` in the dtype of x.

    Sources: group normalisation (arXiv 1803.08494), SiLU (arXiv 1702.03118).

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(f"x must have shape [N, R, C] with R > 0, got {list(x.shape)}")
    n, _, channels = x.shape
    if groups < 1 or channels < 1 or channels % groups:
        raise ValueError(f"{channels} channels do not divide into {groups} groups")
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"weight and bias must have shape [{channels}], got {list(weight.shape)} and {list(bias.shape)}")
    if emb is not None and emb.shape != (n, channels):
        raise ValueError(f"emb must have shape [{n}, {channels}], got {list(emb.shape)}")
    added = x.new_empty(0) if emb is None else emb.contiguous()
    return group_norm_silu_op(x.contiguous(), weight.contiguous(), bias.contiguous(), added, groups, eps, silu)[0]
