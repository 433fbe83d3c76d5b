"""GEGLU and its gradient, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    value, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return value, gate


def geglu(x: Tensor) -> Tensor:
    value, gate = _halves(x)
    return (value * functional.gelu(gate)).to(x.dtype)


def geglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    value, gate = _halves(x)
    upstream = grad.to(value.dtype)
    cdf = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
    density = torch.exp(-0.5 * gate.square()) / math.sqrt(2 * math.pi)
    return torch.cat([upstream * gate * cdf, upstream * value * (cdf + gate * density)], -1).to(x.dtype)


def eager(x: Tensor) -> Tensor:
    """What a model without this operator runs: rounds the GELU to the dtype of x before the product."""
    value, gate = x.chunk(2, -1)
    return value * functional.gelu(gate)
