"""3x3 convolutions from images with few channels, and to such images. Derivation and roofline: README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from fvgen.kernels.image_conv.spec import MOST_TAPS, conv_from_image_op, conv_to_image_op

__all__ = ["MOST_TAPS", "conv_from_image", "conv_to_image", "pack_from_image", "pack_to_image"]


def pack_from_image(weight: Tensor) -> Tensor:
    """The weight of :func:`conv_from_image`, ``[9 C, O]``, of a convolution's ``[O, C, 3, 3]``."""
    return weight.flatten(1).T.contiguous()


def pack_to_image(weight: Tensor) -> Tensor:
    """The weight of :func:`conv_to_image`, ``[C, 9 O]`` tap by tap, of a convolution's ``[O, C, 3, 3]``."""
    return weight.permute(1, 2, 3, 0).flatten(1).contiguous()


def conv_from_image(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3x3 convolution with a border of one zero, from few channels to channels last. Not differentiable.

    Args:
        x: ``[N, C, H, W]`` of any strides and floating dtype, with 9 C up to ``MOST_TAPS``, half of it for a float32 weight (more
            on the slower path).
        weight: ``[9 C, O]`` float32, bfloat16 or float16 (float64 on the slower path), see :func:`pack_from_image`.
        bias: ``[O]`` in the dtype of the weight.

    Returns:
        ``[N, H, W, O]`` in the dtype of the weight, to which x is rounded; summed in at least float32 and rounded once.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x.ndim != 4 or weight.ndim != 2 or weight.shape[0] != 9 * x.shape[1]:
        raise ValueError(f"x must be [N, C, H, W] and weight [9 C, O], got {list(x.shape)} and {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[1:]:
        raise ValueError(f"bias must have shape [{weight.shape[1]}], got {list(bias.shape)}")
    return conv_from_image_op(x, weight.contiguous(), weight.new_empty(0) if bias is None else bias.contiguous())


def conv_to_image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution with a border of one zero, from channels last to few channels. Not differentiable.

    Args:
        x: ``[N, H, W, C]`` float32, bfloat16 or float16 (float64 on the slower path).
        weight: ``[C, 9 O]`` in the dtype of x with 9 O up to ``MOST_TAPS``, half of it in float32 (more on the slower path), see
            :func:`pack_to_image`.
        bias: ``[O]``.

    Returns:
        ``[N, O, H, W]`` float32 (float64 if x is), not rounded on the way.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if x.ndim != 4 or weight.ndim != 2 or weight.shape[0] != x.shape[3] or weight.shape[1] % 9 or weight.dtype != x.dtype:
        raise ValueError(f"x must be [N, H, W, C] and weight [C, 9 O] of its dtype, got {list(x.shape)} and {list(weight.shape)}")
    if bias.shape != (weight.shape[1] // 9,):
        raise ValueError(f"bias must have shape [{weight.shape[1] // 9}], got {list(bias.shape)}")
    return conv_to_image_op(x.contiguous(), weight.contiguous(), bias.contiguous())
