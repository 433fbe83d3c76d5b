"""Linear layer with GEGLU and its gradient, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fvgen.kernels.geglu import reference as gate


def _flat(x: Tensor) -> Tensor:
    """All leading axes as one: ``[M, K]``, also where a size is zero."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _widened(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return gate.geglu(functional.linear(*_widened(x, weight, bias))).to(x.dtype)


def linear_geglu_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    upstream, flat, w, b = _widened(_flat(grad), _flat(x), weight, bias)
    grad_h = gate.geglu_backward(upstream, functional.linear(flat, w, b))
    grad_x = (grad_h @ w).view_as(x)
    return grad_x.to(x.dtype), (grad_h.T @ flat).to(weight.dtype), grad_h.sum(0).to(bias.dtype)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a model without this operator runs: rounds the product and the GELU to the dtype of x."""
    return gate.eager(functional.linear(x, weight, bias))


def eager_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The gradient of :func:`eager` as autograd takes it, in the dtype of x."""
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return torch.autograd.grad(eager(*inputs), inputs, grad)
