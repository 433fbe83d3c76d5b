"""Softmax in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def row_softmax(x: Tensor) -> Tensor:
    exact = torch.promote_types(x.dtype, torch.float32)
    return torch.softmax(x, dim=-1, dtype=exact).to(x.dtype)
