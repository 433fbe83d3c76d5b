"""The VAE with packed weights: channels-last from end to end, biases and residual sums inside the norms that follow.

A convolution with a bias adds it in a pass of its own, so none here has one. What a tensor still lacks, a bias per channel
(known when the weights are packed) and perhaps a residual, is added by whatever reads the tensor next.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.inference.rows import doubling_filters
from fvgen.kernels.group_norm_silu import group_norm_silu, group_norm_silu_residual
from fvgen.kernels.image_conv import conv_from_image, conv_to_image, pack_from_image, pack_to_image
from fvgen.kernels.padded_sum import padded_sum
from fvgen.kernels.row_softmax import row_softmax

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

LOGITS = 1 << 28  # attention logits held at once
INDEXABLE = 1 << 31  # elements of a tensor that convolutions index with 32 bits


class _Lacking(NamedTuple):
    """What is still to be added to a tensor: ``bias`` ``[C]`` float64, and a residual tensor where ``residual`` is set."""

    bias: Tensor
    residual: bool

    @property
    def skipped(self) -> Tensor:
        """The bias missing from the tensor after a norm: the norm stores the whole sum where there was a residual."""
        return torch.zeros_like(self.bias) if self.residual else self.bias


def _filters(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.detach().to(dtype, copy=True).contiguous(memory_format=torch.channels_last)


def _row(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors stay in at least float32."""
    return values.detach().to(torch.promote_types(dtype, torch.float32)).clone()


def _conv(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 1) -> Tensor:
    """``[N, H, W, C]`` to ``[N, H', W', O]``, no bias."""
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=stride, padding=padding)
    return out.permute(0, 2, 3, 1).contiguous()  # no copy where convolutions keep channels last


class _Norm:
    """GroupNorm and SiLU of what a tensor is once its bias and residual are added."""

    def __init__(self, norm: Any, bias: Tensor, dtype: torch.dtype) -> None:
        self.weight, self.bias, self.emb = (_row(v, dtype) for v in (norm.weight, norm.bias, bias))
        self.groups, self.eps = norm.num_groups, norm.eps

    def __call__(self, x: Tensor, residual: Tensor | None = None, silu: bool = True) -> tuple[Tensor, Tensor]:
        """The normalised ``[N, H, W, C]`` and the sum it was made from; without a residual that is x itself, lacking its bias."""
        rows = x.flatten(1, 2)
        options = {"silu": silu, "emb": self.emb}
        if residual is None:
            return group_norm_silu(rows, self.weight, self.bias, self.groups, self.eps, **options).view(x.shape), x
        added = residual.flatten(1, 2)
        out, total = group_norm_silu_residual(rows, added, self.weight, self.bias, self.groups, self.eps, **options)
        return out.view(x.shape), total.view(x.shape)


class _Resnet:
    """Residual block."""

    def __init__(self, block: Any, lacking: _Lacking, dtype: torch.dtype) -> None:
        self.norm_1 = _Norm(block.norm1, lacking.bias, dtype)
        self.norm_2 = _Norm(block.norm2, block.conv1.bias, dtype)
        self.conv_1, self.conv_2 = (_filters(conv.weight, dtype) for conv in (block.conv1, block.conv2))
        self.shortcut, skipped = None, lacking.skipped
        if block.conv_shortcut is not None:
            matrix = block.conv_shortcut.weight.double().flatten(1)
            self.shortcut, skipped = matrix.to(dtype, copy=True), matrix @ skipped + block.conv_shortcut.bias.double()
        self.lacking = _Lacking(block.conv2.bias.double() + skipped, self.shortcut is None)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        h, skip = self.norm_1(x, residual)
        h, _ = self.norm_2(_conv(h, self.conv_1))
        h = _conv(h, self.conv_2)
        if self.shortcut is None:
            return h, skip
        h.flatten(0, 2).addmm_(skip.flatten(0, 2), self.shortcut.t())
        return h, None


class _Attention:
    """Self-attention over the pixels of a frame with one head as wide as the tensor, which no fused kernel serves.

    With a single head, softmax((Wq x + bq) . (Wk x + bk)) needs only the product of the two matrices: keys are the
    normalised pixels themselves, and bk, the same for every key, cancels. The output projection goes into the values.
    """

    def __init__(self, attention: Any, lacking: _Lacking, dtype: torch.dtype) -> None:
        if attention.heads != 1:
            raise ValueError(f"the attention of the VAE must have one head, has {attention.heads}")
        layers = (attention.to_q, attention.to_k, attention.to_v, attention.to_out[0])
        q, k, v, out = (layer.weight.double() for layer in layers)
        bias_q, _, bias_v, bias_out = (layer.bias.double() for layer in layers)
        scale = q.shape[0] ** -0.5
        bias = scale * k.t() @ bias_q
        self.norm = _Norm(attention.group_norm, lacking.bias, dtype)
        self.weight = torch.cat([scale * k.t() @ q, out @ v]).to(dtype)
        self.bias = torch.cat([bias, torch.zeros_like(bias)]).to(dtype)
        self.lacking = _Lacking(out @ bias_v + bias_out + lacking.skipped, False)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, None]:
        h, total = self.norm(x, residual, silu=False)
        keys, rows = h.flatten(1, 2), total.flatten(1, 2)
        queries, values = F.linear(keys, self.weight, self.bias).chunk(2, dim=-1)
        frames = max(1, LOGITS // keys.shape[1] ** 2)
        for part in (slice(i, i + frames) for i in range(0, keys.shape[0], frames)):
            weights = row_softmax(torch.bmm(queries[part], keys[part].transpose(1, 2)))
            rows[part].baddbmm_(weights, values[part])
        return total, None


class _Resampler:
    """A 3x3 convolution that changes the size and pads with zeros, for an input x that lacks a bias b.

    Padding x with -b instead makes x + b zero on the border; inside, b only adds its constant response to the output's bias.
    """

    def __init__(self, conv: Any, lacking: _Lacking, dtype: torch.dtype) -> None:
        weight = conv.weight.double()
        self.fill = (-lacking.bias).to(dtype)
        self.weight = self.pack(weight, dtype)
        self.lacking = _Lacking(conv.bias.double() - weight.sum((2, 3)) @ self.fill.double(), False)

    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return _filters(weight, dtype)


class _Downsample(_Resampler):
    """Stride 2, padded at the bottom and on the right only."""

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, None]:
        return _conv(padded_sum(x, residual, self.fill, 0, 1), self.weight, stride=2, padding=0), None


class _Upsample(_Resampler):
    """Nearest doubling and the convolution as a transposed 4x4 convolution with stride 2: 2.25 times fewer FLOPs."""

    def pack(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return _filters(doubling_filters(weight), dtype)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, None]:
        padded = padded_sum(x, residual, self.fill, 1, 1).permute(0, 3, 1, 2)
        out = F.conv_transpose2d(padded, self.weight, stride=2, padding=3)
        return out.permute(0, 2, 3, 1).contiguous(), None


class _Stem:
    """The first convolution, with the 1x1 convolution before it, if any, multiplied into its weights.

    The latter's bias must be zero on the zero padding, so it multiplies an input channel of ones.
    """

    def __init__(self, conv: Any, before: Any, dtype: torch.dtype) -> None:
        weight = conv.weight.double()
        self.ones = before is not None
        if before is not None:
            columns = torch.cat([before.weight.double().flatten(1), before.bias.double()[:, None]], dim=1)
            weight = torch.einsum("omkl,mi->oikl", weight, columns)
        self.weight = pack_from_image(weight).to(dtype)
        self.lacking = _Lacking(conv.bias.double(), False)

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, C, H, W]`` of any dtype and layout to ``[N, H, W, O]``."""
        if self.ones:
            images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
        return conv_from_image(images, self.weight)


class _Head:
    """The last norm and convolution, with the 1x1 convolution after it, if any, multiplied into its weights."""

    def __init__(self, norm: Any, conv: Any, after: Any, lacking: _Lacking, dtype: torch.dtype) -> None:
        weight, bias = conv.weight.double(), conv.bias.double()
        if after is not None:
            matrix = after.weight.double().flatten(1)
            weight, bias = torch.einsum("om,mikl->oikl", matrix, weight), matrix @ bias + after.bias.double()
        self.norm = _Norm(norm, lacking.bias, dtype)
        self.weight, self.bias = pack_to_image(weight).to(dtype), _row(bias, dtype)

    def __call__(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """``[N, C, H, W]`` contiguous, in the dtype of the bias."""
        return conv_to_image(self.norm(x, residual)[0], self.weight, self.bias)


class _Chain:
    """Stem, blocks and head; every part is packed knowing what its input lacks."""

    def __init__(self, stem: _Stem, dtype: torch.dtype) -> None:
        self.stem, self.dtype, self.lacking = stem, dtype, stem.lacking
        self.steps: list[Any] = []

    def add(self, kind: Any, module: Any) -> None:
        self.steps.append(kind(module, self.lacking, self.dtype))
        self.lacking = self.steps[-1].lacking

    def add_middle(self, block: Any) -> None:
        self.add(_Resnet, block.resnets[0])
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                self.add(_Attention, attention)
            self.add(_Resnet, resnet)

    def finish(self, network: Any, after: Any) -> _Chain:
        self.head = _Head(network.conv_norm_out, network.conv_out, after, self.lacking, self.dtype)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        x, residual = self.stem(images), None
        for step in self.steps:
            x, residual = step(x, residual)
        return self.head(x, residual)


def _encoder(vae: Any, dtype: torch.dtype) -> _Chain:
    chain = _Chain(_Stem(vae.encoder.conv_in, None, dtype), dtype)
    for block in vae.encoder.down_blocks:
        for resnet in block.resnets:
            chain.add(_Resnet, resnet)
        for sampler in block.downsamplers or ():
            chain.add(_Downsample, sampler.conv)
    chain.add_middle(vae.encoder.mid_block)
    return chain.finish(vae.encoder, vae.quant_conv)


def _decoder(vae: Any, dtype: torch.dtype) -> _Chain:
    chain = _Chain(_Stem(vae.decoder.conv_in, vae.post_quant_conv, dtype), dtype)
    chain.add_middle(vae.decoder.mid_block)
    for block in vae.decoder.up_blocks:
        for resnet in block.resnets:
            chain.add(_Resnet, resnet)
        for sampler in block.upsamplers or ():
            chain.add(_Upsample, sampler.conv)
    return chain.finish(vae.decoder, None)


class PackedVAE:
    """An ``AutoencoderKL`` for inference: same results, weights copied, no gradients, recordable in a CUDA graph.

    Args:
        vae: diffusers ``AutoencoderKL`` of plain encoder and decoder blocks, on the device to be used. It is left alone;
            later changes of its weights do not show here.
        dtype: of weights and activations. Vectors and everything that is accumulated stay in at least float32.
        chunk: frames per pass, which bounds memory; None takes as many as convolutions can index with 32 bits.

    Raises:
        ValueError: a structure that is not covered.
    """

    @torch.no_grad()
    def __init__(self, vae: AutoencoderKL, dtype: torch.dtype, chunk: int | None = None) -> None:
        config = vae.config
        kinds = {*config.down_block_types, *config.up_block_types}
        if kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"} or config.act_fn not in ("silu", "swish"):
            raise ValueError(f"a VAE of {sorted(kinds)} with {config.act_fn} cannot be packed")
        self.chunk = chunk
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self._widest = max(config.block_out_channels[:2])  # channels of the largest tensors, which have the size of the frames
        self._encoder = _encoder(vae, dtype)
        self._decoder = _decoder(vae, dtype)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Moments ``[N, 2 C, h, w]`` float32 (float64 if packed so), mean and log-variance, of ``[N, 3, H, W]`` in [-1, 1].

        Args:
            pixels: any floating dtype and layout; H and W are multiples of the reduction factor.
        """
        return self._run(self._encoder, pixels, 1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels ``[N, 3, H, W]`` float32 (float64 if packed so), not clamped, of latents ``[N, C, h, w]``.

        Args:
            latents: divided by the scaling factor; any floating dtype and layout.
        """
        return self._run(self._decoder, latents, self.factor)

    def _run(self, chain: _Chain, images: Tensor, factor: int) -> Tensor:
        n, _, height, width = images.shape
        if self.chunk is not None:
            parts = images.split(self.chunk)
        else:
            frame = (factor * height + 2) * (factor * width + 2) * self._widest
            parts = images.tensor_split(max(1, math.ceil(n / max(1, INDEXABLE // frame))))
        done = [chain(part) for part in parts]
        return done[0] if len(done) == 1 else torch.cat(done)
