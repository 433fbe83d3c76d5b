"""The network of DUSt3R: one encoder for both images, two decoders in lockstep, one head each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from fvgen.utils.errors import UserError

from .head import DptHead, PointMap, point_map
from .layers import NORM_EPS, DecoderBlock, EncoderBlock, Rotary, grid_positions, rotary
from .sizes import check_sizes


@dataclass(frozen=True)
class Features:
    """Encoded images.

    Attributes:
        tokens: ``[B, N, width]``, row by row of each image's own grid.
        grid: (rows, columns) of tokens of the images as they are stored.
        transposed: ``[B]`` bool, the images that are stored transposed and have (columns, rows) tokens; None = none of them.
    """

    tokens: Tensor
    grid: tuple[int, int]
    transposed: Tensor | None = None

    def __getitem__(self, rows: slice) -> Features:
        return Features(self.tokens[rows], self.grid, None if self.transposed is None else self.transposed[rows])

    @staticmethod
    def join(parts: Sequence[Features]) -> Features:
        """One batch of images that are stored upright and have one size."""
        return Features(torch.cat([part.tokens for part in parts]), parts[0].grid)

    def positions(self) -> Tensor:
        """Token indices (y, x) ``[B, N, 2]``."""
        upright = grid_positions(self.grid, self.tokens.device).expand(len(self.tokens), -1, -1)
        if self.transposed is None:
            return upright
        return torch.where(self.transposed[:, None, None], grid_positions(self.grid[::-1], self.tokens.device), upright)


class Dust3rNetwork(ModelMixin, ConfigMixin):
    """Two images to a point map each, both in the frame of the first camera (OpenCV axes).

    Args:
        patch_size: side of a token in pixels; image sides are multiples of it.
        encoder_width, encoder_layers, encoder_heads: size of the encoder.
        decoder_width, decoder_layers, decoder_heads: size of each decoder.
        mlp_ratio: hidden width of the MLPs over the width.
        rope_base: of the rotary positions.
        layer_widths, feature_width, last_width: size of the heads.
        image_size: long side of the images that it was trained on, pixels; others can be put in.

    Raises:
        UserError: impossible sizes.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: int = 16,
        encoder_width: int = 1024,
        encoder_layers: int = 24,
        encoder_heads: int = 16,
        decoder_width: int = 768,
        decoder_layers: int = 12,
        decoder_heads: int = 12,
        mlp_ratio: float = 4.0,
        rope_base: float = 100.0,
        layer_widths: Sequence[int] = (96, 192, 384, 768),
        feature_width: int = 256,
        last_width: int = 128,
        image_size: int = 512,
    ) -> None:
        check_sizes({name: value for name, value in locals().items() if name != "self"})
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, encoder_width, patch_size, stride=patch_size)
        self.encoder = nn.ModuleList(EncoderBlock(encoder_width, encoder_heads, mlp_ratio) for _ in range(encoder_layers))
        self.encoder_norm = nn.LayerNorm(encoder_width, eps=NORM_EPS)
        self.decoder_embedding = nn.Linear(encoder_width, decoder_width)
        self.decoder_1 = nn.ModuleList(DecoderBlock(decoder_width, decoder_heads, mlp_ratio) for _ in range(decoder_layers))
        self.decoder_2 = nn.ModuleList(DecoderBlock(decoder_width, decoder_heads, mlp_ratio) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=NORM_EPS)
        widths = [encoder_width] + [decoder_width] * 3
        self.head_1 = DptHead(widths, layer_widths, feature_width, last_width)
        self.head_2 = DptHead(widths, layer_widths, feature_width, last_width)
        self.head_depths = (0, decoder_layers // 2, decoder_layers * 3 // 4, decoder_layers)

    def trunk_to(self, dtype: torch.dtype) -> Dust3rNetwork:
        """Casts encoder and decoders in place; the heads stay float32. Returns itself."""
        for name, part in self.named_children():
            if not name.startswith("head_"):
                part.to(dtype=dtype)
        return self

    def forward(
        self, image_1: Tensor, image_2: Tensor, transposed_1: Tensor | None = None, transposed_2: Tensor | None = None
    ) -> tuple[PointMap, PointMap]:
        """Point maps of both images in the frame of the first.

        Args:
            image_1, image_2: ``[B, 3, H, W]`` in [-1, 1]; the two may differ in size.
            transposed_1, transposed_2: ``[B]`` bool, images that are stored transposed; their maps are transposed back, so that
                portrait and landscape images of one size go through in one batch.
        """
        if image_1.shape == image_2.shape and (transposed_1 is None) == (transposed_2 is None):
            transposed = None if transposed_1 is None or transposed_2 is None else torch.cat([transposed_1, transposed_2])
            both, count = self.encode(torch.cat([image_1, image_2]), transposed), len(image_1)
            return self.decode(both[:count], both[count:])
        return self.decode(self.encode(image_1, transposed_1), self.encode(image_2, transposed_2))

    def encode(self, image: Tensor, transposed: Tensor | None = None) -> Features:
        """Features of images ``[B, 3, H, W]`` in [-1, 1]; ``transposed`` as in :meth:`forward`.

        Raises:
            UserError: a side is no multiple of the patch size.
        """
        patch = self.config["patch_size"]
        height, width = image.shape[-2:]
        if height % patch or width % patch:
            raise UserError(f"an image of {width}x{height} pixels does not divide into patches of {patch}; crop it to a multiple")
        grid = (height // patch, width // patch)
        image = image.to(self.patch_embedding.weight.dtype)
        tokens = self.patch_embedding(image).flatten(2).transpose(1, 2)
        if transposed is not None:
            turned = self.patch_embedding(image.transpose(2, 3)).flatten(2).transpose(1, 2)
            tokens = torch.where(transposed[:, None, None], turned, tokens)
        features = Features(tokens, grid, transposed)
        angles = self._angles(features, self.config["encoder_width"] // self.config["encoder_heads"])
        for block in self.encoder:
            tokens = block(tokens, angles)
        return Features(self.encoder_norm(tokens), grid, transposed)

    def decode(self, first: Features, second: Features) -> tuple[PointMap, PointMap]:
        """Point maps of both images in the frame of ``first``. Encoded images can be used again in other pairs."""
        depths_1, depths_2 = self._decoders(first, second)
        return self._predict(self.head_1, depths_1, first), self._predict(self.head_2, depths_2, second)

    def _angles(self, features: Features, head_width: int) -> Rotary:
        return rotary(features.positions(), head_width, self.config["rope_base"])

    def _decoders(self, first: Features, second: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens for the heads: of the encoder, then of each decoder block; only the very last ones are normalised."""
        head_width = self.config["decoder_width"] // self.config["decoder_heads"]
        angles_1, angles_2 = self._angles(first, head_width), self._angles(second, head_width)
        x_1, x_2 = self.decoder_embedding(first.tokens), self.decoder_embedding(second.tokens)
        depths_1, depths_2 = [first.tokens], [second.tokens]
        for block_1, block_2 in zip(self.decoder_1, self.decoder_2, strict=True):
            x_1, x_2 = block_1(x_1, x_2, angles_1, angles_2), block_2(x_2, x_1, angles_2, angles_1)
            depths_1.append(x_1)
            depths_2.append(x_2)
        return [*depths_1[:-1], self.decoder_norm(x_1)], [*depths_2[:-1], self.decoder_norm(x_2)]

    def _predict(self, head: DptHead, depths: list[Tensor], features: Features) -> PointMap:
        used = [depths[i] for i in self.head_depths]
        if features.transposed is None:
            return point_map(head(used, features.grid))
        patch = self.config["patch_size"]
        rows, columns = features.grid
        raw = used[0].new_empty(len(used[0]), 4, rows * patch, columns * patch, dtype=torch.float32)
        for turned, grid in ((False, (rows, columns)), (True, (columns, rows))):
            chosen = features.transposed == turned
            if chosen.any():
                part = head([tokens[chosen] for tokens in used], grid)
                raw[chosen] = part.transpose(2, 3) if turned else part
        return point_map(raw)
