"""The network's layers on fused operators, for training on a GPU: rows ``[N, R, C]`` of N frames with R pixels, channels last.

The modules take these where :func:`applies` says so, with the same parameters and gradients; otherwise plain PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvgen import envs
from fvgen.kernels.group_norm_silu import group_norm_silu, group_norm_silu_residual
from fvgen.kernels.layer_norm_residual import layer_norm_residual


def applies(x: Tensor) -> bool:
    """Whether ``x`` is to go through the fused operators: half precision on a GPU, unless FVGEN_KERNELS=reference."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and envs.kernels_mode() != "reference"


def to_rows(image: Tensor) -> Tensor:
    """``[N, C, H, W]`` to ``[N, H W, C]``; a view where the memory format is channels_last."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def to_image(rows: Tensor, height: int) -> Tensor:
    """``[N, H W, C]`` to ``[N, C, H, W]`` in channels_last format, a view."""
    return rows.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def group_norm(norm: nn.GroupNorm, rows: Tensor, silu: bool = True, emb: Tensor | None = None) -> Tensor:
    """``norm(rows + emb)`` and SiLU; ``emb [N, C]`` or ``[C]``."""
    weight, bias = norm.weight.to(rows.dtype), norm.bias.to(rows.dtype)
    return group_norm_silu(rows, weight, bias, norm.num_groups, norm.eps, silu=silu, emb=emb)


def group_norm_sum(norm: nn.GroupNorm, rows: Tensor, residual: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``silu(norm(total))`` and ``total = rows + residual + bias``; ``bias [C]``."""
    weight, shift = norm.weight.to(rows.dtype), norm.bias.to(rows.dtype)
    return group_norm_silu_residual(rows, residual, weight, shift, norm.num_groups, norm.eps, emb=bias.to(rows.dtype))


def layer_norm(norm: nn.LayerNorm, rows: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``norm(total)`` and ``total = rows + residual``."""
    return layer_norm_residual(rows, norm.weight.to(rows.dtype), norm.bias.to(rows.dtype), residual, eps=norm.eps)


def packed_linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Layers without bias on one input, as one product; their outputs side by side."""
    return F.linear(x, torch.cat([layer.weight for layer in layers]))


def convolution(rows: Tensor, height: int, conv: nn.Conv2d) -> Tensor:
    """``[N, H W, C]`` through a convolution of stride 1 without its bias, which is left to the next normalisation."""
    return to_rows(F.conv2d(to_image(rows, height), conv.weight, None, padding=conv.padding))
