"""Operator descriptions of the convolutions from and to images with few channels."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.image_conv import reference

MOST_TAPS = 256  # times channels, of half precision: more do not fit into a tile, and ordinary convolutions do better


def _from(
    device: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int, int],
    outputs: int,
    bias: bool = True,
    strided: bool = False,
    image: torch.dtype | None = None,
) -> tuple:
    """x, in a dtype of its own where ``image`` names one, and a weight that makes the output about as large as x."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn((*shape[:1], *shape[2:], shape[1]) if strided else shape, generator=random)
    x = x.permute(0, 3, 1, 2) if strided else x
    weight = torch.randn((9 * shape[1], outputs), generator=random) / math.sqrt(9 * shape[1])
    added = 0.3 * torch.randn(outputs if bias else 0, generator=random)
    return x.to(device, image or dtype), weight.to(device, dtype), added.to(device, dtype)


def _to(device: str, dtype: torch.dtype, *, shape: tuple[int, int, int, int], outputs: int) -> tuple:
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=random) for s in (shape, (shape[3], 9 * outputs), (outputs,)))
    return x.to(device, dtype), (weight / math.sqrt(max(9 * shape[3], 1))).to(device, dtype), bias.to(device)


def _fake_from(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    fits = x.ndim == 4 and weight.ndim == 2 and weight.shape[0] == 9 * x.shape[1]
    torch._check(fits, lambda: "x must have shape [N, C, H, W] and weight [9 C, O]")
    torch._check(bias.shape in ((0,), weight.shape[1:]), lambda: "bias must have shape [O] or be empty")
    return weight.new_empty((x.shape[0], *x.shape[2:], weight.shape[1]))


def _fake_to(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    fits = x.ndim == 4 and weight.ndim == 2 and weight.shape[0] == x.shape[3] and weight.shape[1] % 9 == 0
    torch._check(fits, lambda: "x must have shape [N, H, W, C] and weight [C, 9 O]")
    torch._check(bias.shape == (weight.shape[1] // 9,), lambda: "bias must have shape [O]")
    exact = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((x.shape[0], weight.shape[1] // 9, *x.shape[1:3]), dtype=exact)


def _large(height: int, width: int) -> str | None:
    return "2^30 pixels in an image" if height * width > 2**30 else None


def _supports_from(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if weight.dtype != bias.dtype or x.dtype == torch.float64 or not x.is_floating_point():
        return "dtypes that do not fit"
    if weight.shape[0] * weight.element_size() > 2 * MOST_TAPS:
        return f"{weight.shape[0]} taps in {weight.dtype}"
    if sum(stride * size for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True)) >= 2**31:
        return "an image that takes 2^31 numbers"
    return _large(*x.shape[2:]) or unsupported(weight, bias)


def _supports_to(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    if weight.dtype != x.dtype:
        return "different dtypes"
    if weight.shape[1] * weight.element_size() > 2 * MOST_TAPS:
        return f"{weight.shape[1]} taps in {weight.dtype}"
    return _large(*x.shape[1:3]) or unsupported(x, weight, bias)


def _cost_from(x: Tensor, weight: Tensor, bias: Tensor) -> Cost:
    out = x.shape[0] * x.shape[2] * x.shape[3] * weight.shape[1]
    moved = x.numel() * x.element_size() + (weight.numel() + bias.numel() + out) * weight.element_size()
    return Cost(bytes=moved, flops=2 * out * weight.shape[0])


def _cost_to(x: Tensor, weight: Tensor, bias: Tensor) -> Cost:
    out = x.numel() // max(x.shape[3], 1) * bias.numel()
    moved = (x.numel() + weight.numel()) * x.element_size() + 4 * (bias.numel() + out)
    return Cost(bytes=moved, flops=18 * out * x.shape[3])


def _eager_from(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A channels-last convolution whose input channels are filled up to a multiple of 8, as fast algorithms want them."""
    missing = -x.shape[1] % 8
    filters = F.pad(weight.T.unflatten(1, (x.shape[1], 3, 3)), (0, 0, 0, 0, 0, missing))
    image = F.pad(x.to(weight.dtype), (0, 0, 0, 0, 0, missing))
    image, filters = (t.contiguous(memory_format=torch.channels_last) for t in (image, filters))
    return F.conv2d(image, filters, bias if bias.numel() else None, padding=1).permute(0, 2, 3, 1)


def _eager_to(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same the other way: output channels filled up to a multiple of 8."""
    outputs = weight.shape[1] // 9
    filters = F.pad(weight.unflatten(1, (3, 3, outputs)).permute(3, 0, 1, 2), (0, 0, 0, 0, 0, 0, 0, -outputs % 8))
    out = F.conv2d(x.permute(0, 3, 1, 2), filters.contiguous(memory_format=torch.channels_last), padding=1)
    return out[:, :outputs] + bias[:, None, None]


def _from_kernel(image: str, kind: str, channels: int, bias: bool) -> TritonKernel:
    """As ``triton.from_tile`` cuts it up for many outputs."""
    pointers = {"x_ptr": image, "weight_ptr": kind, "bias_ptr": kind, "out_ptr": kind}
    sizes = dict.fromkeys(("height", "width", "image", "channel", "row", "column", "outputs"), "i32")
    block_k = 1 << (9 * channels - 1).bit_length()
    constants: dict[str, Any] = {"CHANNELS": channels, "HAS_BIAS": bias, "BLOCK_M": min(128, 8192 // block_k)}
    constants |= {"BLOCK_K": block_k, "BLOCK_N": 64}
    warps = 8 if block_k > 32 else 4
    return TritonKernel("image_conv.triton", "from_image_kernel", {**pointers, **sizes}, constants, warps, multiples=("outputs",))


def _taps_kernel(kind: str, outputs: int) -> TritonKernel:
    signature = {"x_ptr": kind, "weight_ptr": kind, "taps_ptr": "*fp32", "pixels": "i32", "channels": "i32"}
    block_n = 1 << (9 * outputs - 1).bit_length()
    constants = {"WIDTH": 9 * outputs, "BLOCK_M": 128, "BLOCK_K": 32 if kind == "*fp32" else 64, "BLOCK_N": block_n}
    warps = 8 if block_n > 64 else 4
    return TritonKernel("image_conv.triton", "taps_kernel", signature, constants, warps, multiples=("channels",))


def _sum_kernel(outputs: int) -> TritonKernel:
    signature = {**dict.fromkeys(("taps_ptr", "bias_ptr", "out_ptr"), "*fp32"), "height": "i32", "width": "i32"}
    return TritonKernel("image_conv.triton", "sum_taps_kernel", signature, {"OUTPUTS": outputs, "BLOCK": 1024})


_FROM: dict[str, dict] = {
    "small": {"shape": (2, 3, 5, 7), "outputs": 8},
    "odd": {"shape": (3, 5, 4, 6), "outputs": 33, "bias": False},
    "channels_last": {"shape": (2, 8, 6, 5), "outputs": 24, "strided": True},
    "float32_image": {"shape": (1, 3, 9, 8), "outputs": 16, "image": torch.float32},
    "across_tiles": {"shape": (2, 1, 13, 21), "outputs": 160},
    "one_pixel": {"shape": (2, 3, 1, 1), "outputs": 4},
    "many_taps": {"shape": (1, 14, 9, 4), "outputs": 70},
    "empty": {"shape": (0, 3, 5, 7), "outputs": 8},
}
_TO: dict[str, dict] = {
    "small": {"shape": (2, 5, 7, 16), "outputs": 3},
    "odd": {"shape": (3, 4, 6, 33), "outputs": 5},
    "across_tiles": {"shape": (2, 13, 21, 72), "outputs": 1},
    "one_pixel": {"shape": (2, 1, 1, 8), "outputs": 4},
    "deep": {"shape": (1, 3, 5, 200), "outputs": 8},
    "many_taps": {"shape": (1, 9, 4, 40), "outputs": 14},
    "no_images": {"shape": (0, 5, 7, 16), "outputs": 3},
}
# first and last convolutions of the VAE and of the network
_FROM_CLIPS: dict[str, dict] = {
    "16x320x512_encoder": {"shape": (16, 3, 320, 512), "outputs": 128, "bias": False, "image": torch.float32},
    "16x40x64_decoder": {"shape": (16, 5, 40, 64), "outputs": 512, "bias": False, "image": torch.float32},
    "16x40x64_network": {"shape": (16, 8, 40, 64), "outputs": 320, "image": torch.float32},
    "25x576x1024_encoder": {"shape": (25, 3, 576, 1024), "outputs": 128, "bias": False, "image": torch.float32},
}
_TO_CLIPS: dict[str, dict] = {
    "16x320x512_decoder": {"shape": (16, 320, 512, 128), "outputs": 3},
    "16x40x64_encoder": {"shape": (16, 40, 64, 512), "outputs": 8},
    "16x40x64_network": {"shape": (16, 40, 64, 320), "outputs": 4},
    "25x576x1024_decoder": {"shape": (25, 576, 1024, 128), "outputs": 3},
}

FROM = OpSpec(
    name="conv_from_image",
    schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    reference=reference.conv_from_image,
    fake=_fake_from,
    fast=launcher("image_conv.triton", "conv_from_image"),
    available=unavailable,
    supports=_supports_from,
    cases=tuple(Case(name, partial(_from, **given)) for name, given in _FROM.items()),
    benchmarks=tuple(Case(name, partial(_from, **given)) for name, given in _FROM_CLIPS.items()),
    tolerance=Tolerance(forward=5e-6),
    cost=_cost_from,
    baselines={"eager": _eager_from},
    kernels=(
        _from_kernel("*fp32", "*bf16", 3, False),
        _from_kernel("*fp32", "*bf16", 5, False),
        _from_kernel("*fp32", "*bf16", 8, True),
        _from_kernel("*fp32", "*bf16", 28, True),
        _from_kernel("*fp32", "*fp32", 14, True),
    ),
)
TO = OpSpec(
    name="conv_to_image",
    schema="(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    reference=reference.conv_to_image,
    fake=_fake_to,
    fast=launcher("image_conv.triton", "conv_to_image"),
    available=unavailable,
    supports=_supports_to,
    cases=tuple(Case(name, partial(_to, **given)) for name, given in _TO.items()),
    benchmarks=tuple(Case(name, partial(_to, **given)) for name, given in _TO_CLIPS.items()),
    tolerance=Tolerance(forward=5e-6),
    cost=_cost_to,
    baselines={"eager": _eager_to},
    kernels=(
        _taps_kernel("*bf16", 3),
        _taps_kernel("*bf16", 4),
        _taps_kernel("*bf16", 8),
        _taps_kernel("*bf16", 16),
        _taps_kernel("*fp32", 14),
        _sum_kernel(3),
    ),
)

conv_from_image_op = build_op(FROM)
conv_to_image_op = build_op(TO)
SPECS = (FROM, TO)
