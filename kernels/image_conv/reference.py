"""Both convolutions in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_from_image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    exact = torch.promote_types(weight.dtype, torch.float32)
    filters = weight.T.unflatten(1, (x.shape[1], 3, 3)).to(exact)
    out = F.conv2d(x.to(weight.dtype).to(exact), filters, bias.to(exact) if bias.numel() else None, padding=1)
    return out.permute(0, 2, 3, 1).to(weight.dtype).contiguous()


def conv_to_image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    filters = weight.unflatten(1, (3, 3, -1)).permute(3, 0, 1, 2).to(exact)
    return F.conv2d(x.permute(0, 3, 1, 2).to(exact), filters, bias.to(exact), padding=1).contiguous()
