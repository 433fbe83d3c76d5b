"""Convolution over three frames at every site, its gradient and the statistics of its output, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

ROWS = 128  # consecutive rows (t, s) of a clip whose statistics are taken together
_filters = WeakTensorKeyDictionary()


def _padded(x: Tensor) -> Tensor:
    """``[B, T + 2, S, C]`` with a frame of zeros on either side, at least in float32."""
    return functional.pad(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 0, 0, 0, 1, 1))


def temporal_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    padded, frames = _padded(x), x.shape[1]
    earlier, same, later = (padded[:, k : k + frames] @ w.T for k, w in enumerate(weight.to(padded.dtype)))
    out = earlier + same + later
    if bias.numel():
        out = out + bias.to(out.dtype)
    if residual.numel():
        out = out + residual.to(out.dtype)
    return out.to(x.dtype)


def temporal_conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    padded, frames = _padded(x), x.shape[1]
    upstream, none = grad.to(padded.dtype), grad.new_empty(0)
    taps = [torch.einsum("btso,btsc->oc", upstream, padded[:, k : k + frames]) for k in range(3)]
    grad_x = temporal_conv(grad, weight.flip(0).transpose(1, 2), none, none)
    return grad_x, torch.stack(taps).to(weight.dtype), upstream.sum((0, 1, 2)).to(weight.dtype)


def temporal_conv_statistics(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    out = temporal_conv(x, weight, bias, x.new_empty(0))
    clips, frames, sites, channels = out.shape
    rows = out.view(clips, frames * sites, channels).to(torch.promote_types(x.dtype, torch.float32))
    partial = rows.new_empty((clips, -(-rows.shape[1] // ROWS), 2, channels))
    for i in range(partial.shape[1]):
        block = rows[:, i * ROWS : (i + 1) * ROWS]
        mean = block.mean(1, keepdim=True)
        partial[:, i, 0] = mean[:, 0]
        partial[:, i, 1] = (block - mean).square().sum(1)
    return out, partial


def cudnn(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """What a model without this operator runs: a 2-D convolution over (t, s), then the sum with the residual."""
    if weight not in _filters:  # laid out once, as a model does at its start
        _filters[weight] = weight.permute(1, 2, 0).unsqueeze(-1).contiguous(memory_format=torch.channels_last)
    image, added = x.permute(0, 3, 1, 2), bias if bias.numel() else None
    out = functional.conv2d(image, _filters[weight], added, padding=(1, 0)).permute(0, 2, 3, 1)
    return out + residual if residual.numel() else out
