"""Residual blocks on rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.inference.rows import Convolution, Doubling, Grid, Linear, Norm, Pending
from fvgen.kernels.temporal_conv import pack, temporal_conv, temporal_conv_statistics
from fvgen.models.blocks import ResBlock, TemporalConv


class ResidualEngine:
    """:class:`fvgen.models.blocks.ResBlock` on rows: every bias, embedding and sum is taken by a normalisation."""

    def __init__(self, block: ResBlock, dtype: torch.dtype) -> None:
        self.norm_1, self.norm_2 = Norm(block.norm_1, dtype), Norm(block.norm_2, dtype)
        self.conv_1, self.conv_2 = Convolution(block.conv_1, dtype), Convolution(block.conv_2, dtype)
        self.skip: Linear | None = None
        if not isinstance(block.skip, torch.nn.Identity):
            self.skip = Linear(block.skip.weight.flatten(1), block.skip.bias + block.conv_2.bias, dtype)
        self.temporal = None if block.temporal_conv is None else _TemporalConv(block.temporal_conv, dtype)

    def __call__(self, x: Pending, shift: Tensor, grid: Grid, skip: Tensor | None = None) -> tuple[Pending, Tensor]:
        """The block's output and, summed, its input ``[N, R, C_in]``.

        Args:
            x: the input.
            shift: ``[C]`` or ``[N, C]``: projected time embedding plus the first convolution's bias.
            grid: what the rows are.
            skip: further channels of the input, or none.
        """
        frames = x.x.shape[0]
        h, total = self.norm_1(x, frames, skip=skip)
        h = self.conv_1(h, grid.height, grid.width)
        h, _ = self.norm_2(Pending(h), frames, shift)
        h = self.conv_2(h, grid.height, grid.width)
        out = Pending(h, total, self.conv_2.bias) if self.skip is None else Pending(h, self.skip(total))
        return (out if self.temporal is None else self.temporal(out, grid)), total


class _TemporalConv:
    """Each convolution takes the statistics for the norm after it on the way; the last one adds the residual."""

    def __init__(self, block: TemporalConv, dtype: torch.dtype) -> None:
        self.norms = [Norm(norm, dtype) for norm in block.norms]
        self.weights = [pack(conv.weight.detach().to(dtype)) for conv in block.convs]
        self.biases = [conv.bias.detach().to(dtype) for conv in block.convs]

    def __call__(self, x: Pending, grid: Grid) -> Pending:
        h, total = self.norms[0](x, grid.batch)
        clip = (grid.batch, grid.frames, grid.height * grid.width, -1)
        for norm, weight, bias in zip(self.norms[1:], self.weights, self.biases, strict=False):
            h = norm.given(*temporal_conv_statistics(h.view(clip), weight, bias))
        h = temporal_conv(h.view(clip), self.weights[-1], self.biases[-1], residual=total.view(clip))
        return Pending(h.view(total.shape))


class Downsample:
    """The convolution with stride 2 that leaves a level."""

    def __init__(self, conv: torch.nn.Conv2d, dtype: torch.dtype) -> None:
        self.conv = Convolution(conv, dtype, add_bias=True)

    def __call__(self, x: Tensor, grid: Grid) -> tuple[Pending, Grid]:
        """``[N, R, C]`` to rows of the next level, and what those are."""
        rows = self.conv(x, grid.height, grid.width)
        return Pending(rows), grid._replace(height=-(-grid.height // 2), width=-(-grid.width // 2))


class Upsample:
    """Doubling and the convolution after it."""

    def __init__(self, conv: torch.nn.Conv2d, dtype: torch.dtype) -> None:
        self.conv = Doubling(conv, dtype)

    def __call__(self, x: Tensor, grid: Grid) -> tuple[Pending, Grid]:
        """As :meth:`Downsample.__call__`."""
        rows = self.conv(x, grid.height, grid.width)
        return Pending(rows, bias=self.conv.bias), grid._replace(height=2 * grid.height, width=2 * grid.width)
