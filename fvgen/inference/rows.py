"""Activations of the engine: ``[N, R, C]`` rows, N = B T frames with R = h w pixels each, channels last."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvgen.kernels.group_norm_silu import (
    group_norm_silu,
    group_norm_silu_given,
    group_norm_silu_residual,
    group_norm_silu_skip,
)


class Grid(NamedTuple):
    """What the rows of an activation stand for."""

    batch: int
    frames: int
    height: int
    width: int


class Pending(NamedTuple):
    """The rows ``x + residual + bias``, left to the next normalisation, which reads them anyway.

    Attributes:
        x: ``[N, R, C]``.
        residual: ``[N, R, C]`` or None.
        bias: ``[C]`` or None.
    """

    x: Tensor
    residual: Tensor | None = None
    bias: Tensor | None = None

    def total(self) -> Tensor:
        """The sum ``[N, R, C]``."""
        if self.residual is None:
            return self.x if self.bias is None else self.x + self.bias
        total = self.x + self.residual
        return total if self.bias is None else total.add_(self.bias)


class Norm:
    """GroupNorm of rows, with SiLU where wanted.

    Args:
        norm: the original.
        dtype: of its weights here.
        silu: whether SiLU follows.
    """

    def __init__(self, norm: nn.GroupNorm, dtype: torch.dtype, silu: bool = True) -> None:
        self.weight, self.bias = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype)
        self.groups, self.eps, self.silu = norm.num_groups, norm.eps, silu

    def __call__(
        self, x: Pending, samples: int, shift: Tensor | None = None, skip: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalised rows and the sum they were made of, both ``[N, R, C]``.

        Args:
            x: the sum to be taken.
            samples: N for statistics per frame, B for those of a whole clip.
            shift: ``[C]`` or ``[samples, C]`` added first but left out of the sum that is returned; without a residual only.
            skip: ``[N, R, C']`` further channels of the sum, for statistics per frame.
        """
        shape, channels = x.x.shape, x.x.shape[2]
        rows = x.x.view(samples, -1, channels)
        options = {"weight": self.weight, "bias": self.bias, "groups": self.groups, "eps": self.eps, "silu": self.silu}
        if skip is not None:
            return group_norm_silu_skip(x.x, skip, emb=x.bias, residual=x.residual, **options)
        if x.residual is None:
            total = x.total()
            return group_norm_silu(total.view(rows.shape), emb=shift, **options).view(shape), total
        residual = x.residual.view(rows.shape)
        out, total = group_norm_silu_residual(rows, residual, emb=x.bias, **options)
        return out.view(shape), total.view(shape)

    def given(self, x: Tensor, partial: Tensor) -> Tensor:
        """Normalised rows of a clip ``[B, T, S, C]`` whose statistics were taken when it was written."""
        rows = x.flatten(1, 2)
        out = group_norm_silu_given(rows, partial, self.weight, self.bias, self.groups, self.eps, silu=self.silu)
        return out.view(x.shape)


class Convolution:
    """A 2-D convolution of rows, without its bias unless told to add it.

    PyTorch adds a convolution's bias in a pass of its own; the next normalisation does it for nothing.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, add_bias: bool = False) -> None:
        self.weight = conv.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = conv.bias.detach().to(dtype)
        self.stride, self.padding, self.add_bias = conv.stride, conv.padding, add_bias

    def __call__(self, rows: Tensor, height: int, width: int) -> Tensor:
        """``[N, height * width, C_in]`` to ``[N, R', C_out]``; the three may also stand for clips, frames and pixels."""
        image = rows.view(-1, height, width, rows.shape[-1]).permute(0, 3, 1, 2)
        out = F.conv2d(image, self.weight, self.bias if self.add_bias else None, self.stride, self.padding)
        return out.permute(0, 2, 3, 1).flatten(1, 2)


class Doubling:
    """Nearest doubling and a 3x3 convolution in one transposed convolution; 2.25 times fewer FLOPs. The bias is left out."""

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype) -> None:
        weight = doubling_filters(conv.weight.detach().double())
        self.weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
        self.bias = conv.bias.detach().to(dtype)

    def __call__(self, rows: Tensor, height: int, width: int) -> Tensor:
        """``[N, height * width, C_in]`` to ``[N, 4 * height * width, C_out]``."""
        image = rows.view(-1, height, width, rows.shape[-1]).permute(0, 3, 1, 2)
        return F.conv_transpose2d(image, self.weight, stride=2, padding=1).permute(0, 2, 3, 1).flatten(1, 2)


def doubling_filters(weight: Tensor) -> Tensor:
    """Filters ``[I, O, 4, 4]`` of the transposed convolution with stride 2 that doubles an image and convolves it.

    A doubled image and three taps k read two source pixels: even outputs (k0, k1 + k2), odd ones (k0 + k1, k2).

    Args:
        weight: ``[O, I, 3, 3]``, best in float64: taps are added up.
    """
    taps = weight.new_tensor(((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0)))  # [tap of the transposed filter, tap]
    return torch.einsum("tk,sl,oikl->iots", taps, taps, weight)


class Linear:
    """``x W^T + b``."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach().to(dtype).contiguous()
        self.bias = None if bias is None else bias.detach().to(dtype)

    @classmethod
    def pack(cls, dtype: torch.dtype, *layers: nn.Linear) -> Linear:
        """Layers of one input side by side; all or none have a bias."""
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return cls(torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., C_in]`` to ``[..., C_out]``."""
        return F.linear(x, self.weight, self.bias)

    def add_to(self, total: Tensor, x: Tensor) -> Tensor:
        """``total += x W^T`` in place, without the bias; both contiguous."""
        return total.view(-1, total.shape[-1]).addmm_(x.view(-1, x.shape[-1]), self.weight.t()).view(total.shape)
