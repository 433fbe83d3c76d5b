"""Dense prediction head (DPT, Ranftl et al., arXiv 2103.13413) and what its four channels mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PointMap(NamedTuple):
    """``points [B, H, W, 3]`` in the network's unit of length and ``confidence [B, H, W]`` above 1; both float32."""

    points: Tensor
    confidence: Tensor


def point_map(raw: Tensor) -> PointMap:
    """Head output ``[B, 4, H, W]`` to points, exponential in the distance, and confidence ``1 + exp``."""
    vector = raw[:, :3].permute(0, 2, 3, 1)
    distance = vector.norm(dim=-1, keepdim=True)
    return PointMap(vector / distance.clamp(min=1e-8) * torch.expm1(distance), 1 + raw[:, 3].exp())


def upsample(x: Tensor) -> Tensor:
    """Twice the size, bilinear, corner pixels kept."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class ResidualUnit(nn.Module):
    """``x + conv(relu(conv(relu(x))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_2(F.relu(self.conv_1(F.relu(x))))


class Fusion(nn.Module):
    """Joins a level with the coarser path and doubles the size. The coarsest level has no path to join."""

    def __init__(self, width: int, coarsest: bool) -> None:
        super().__init__()
        self.unit_level = None if coarsest else ResidualUnit(width)
        self.unit_out = ResidualUnit(width)
        self.conv_out = nn.Conv2d(width, width, 1)

    def forward(self, level: Tensor, path: Tensor | None) -> Tensor:
        if self.unit_level is not None and path is not None:
            level = path + self.unit_level(level)
        return self.conv_out(upsample(self.unit_out(level)))


class DptHead(nn.Module):
    """Tokens of four depths to ``[B, channels, 16 rows, 16 columns]``. Always float32.

    Args:
        token_widths: of the four depths, from the earliest on.
        layer_widths: after the projection of each depth.
        feature_width: of the fused path.
        last_width: before the last convolution.
        channels: of the output.
    """

    def __init__(
        self, token_widths: Sequence[int], layer_widths: Sequence[int], feature_width: int, last_width: int, channels: int = 4
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Conv2d(t, w, 1) for t, w in zip(token_widths, layer_widths, strict=True))
        first, second, _, last = layer_widths
        self.resamplers = nn.ModuleList(
            [
                nn.ConvTranspose2d(first, first, 4, stride=4),
                nn.ConvTranspose2d(second, second, 2, stride=2),
                nn.Identity(),
                nn.Conv2d(last, last, 3, stride=2, padding=1),
            ]
        )
        self.levels = nn.ModuleList(nn.Conv2d(w, feature_width, 3, padding=1, bias=False) for w in layer_widths)
        self.fusions = nn.ModuleList(Fusion(feature_width, coarsest=i == 3) for i in range(4))
        self.conv_1 = nn.Conv2d(feature_width, feature_width // 2, 3, padding=1)
        self.conv_2 = nn.Conv2d(feature_width // 2, last_width, 3, padding=1)
        self.conv_3 = nn.Conv2d(last_width, channels, 1)

    def forward(self, depths: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        """Four times tokens ``[B, rows * columns, width]`` of a ``grid`` of (rows, columns)."""
        with torch.autocast(depths[0].device.type, enabled=False):
            levels = [
                conv(resample(project(tokens.float().transpose(1, 2).unflatten(2, grid))))
                for tokens, project, resample, conv in zip(depths, self.projections, self.resamplers, self.levels, strict=True)
            ]
            # An odd number of tokens gives a coarsest path one row or column too large: its top left part is kept.
            path = self.fusions[3](levels[3], None)[:, :, : levels[2].shape[2], : levels[2].shape[3]]
            for i in (2, 1, 0):
                path = self.fusions[i](levels[i], path)
            return self.conv_3(F.relu(self.conv_2(upsample(self.conv_1(path)))))
