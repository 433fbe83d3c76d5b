"""Photos as DUSt3R wants them: resized and cropped with Pillow on 8 bit, because the network was trained on exactly that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fvgen.utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

PATCH = 16
SQUARE_SIZE = 224  # the model of this size takes centred squares
VIEWCRAFTER_SIZE = (576, 1024)


@dataclass(frozen=True)
class NetworkImage:
    """A photo on its way into the network.

    Attributes:
        pixels: ``[1, 3, H, W]`` float32 in [-1, 1].
        network_from_photo: ``[3, 3]`` float64, takes homogeneous pixels of the photo (centres at +0.5) to pixels of ``pixels``;
            from the left it takes the photo's intrinsics to those of ``pixels``.
    """

    pixels: Tensor
    network_from_photo: Tensor

    @property
    def rgb(self) -> Tensor:
        """``[3, H, W]`` in [0, 1]."""
        return self.pixels[0] / 2 + 0.5


def network_image(rgb: Tensor, size: int = 512, *, square: bool = False) -> NetworkImage:
    """Resize a photo so that its long side is ``size`` and crop it around its centre to multiples of 16.

    Shrinking is Lanczos, enlarging bicubic. A square photo loses a quarter of its height unless ``square``. Size 224 stands for
    the model of that size: the short side becomes 224 and the centre square is kept.

    Args:
        rgb: upright photo ``[3, H, W]`` in [0, 1], landscape or portrait.
        size: that the checkpoint was trained for.
        square: keep a square photo square.

    Raises:
        UserError: nothing would be left of a very long photo.
    """
    photo = _to_pillow(rgb)
    width, height = photo.size
    long_side = round(size * max(width, height) / min(width, height)) if size == SQUARE_SIZE else size
    resized = _resize_long_side(photo, long_side)
    centre_x, centre_y = resized.width // 2, resized.height // 2
    if size == SQUARE_SIZE:
        half_x = half_y = min(centre_x, centre_y)
    else:
        half_x, half_y = (2 * centre_x // PATCH * PATCH // 2, 2 * centre_y // PATCH * PATCH // 2)
        if resized.width == resized.height and not square:
            half_y = 3 * half_x // 4 // (PATCH // 2) * (PATCH // 2)
    if not (half_x and half_y):
        raise UserError(f"a photo of {width}x{height} pixels is too long and narrow; crop it to a wider part")
    left, top = centre_x - half_x, centre_y - half_y
    cropped = resized.crop((left, top, centre_x + half_x, centre_y + half_y))
    scale_x, scale_y = resized.width / width, resized.height / height
    mapping = [[scale_x, 0, -left], [0, scale_y, -top], [0, 0, 1]]
    return NetworkImage(_from_pillow(cropped)[None] * 2 - 1, torch.tensor(mapping, dtype=torch.float64))


def viewcrafter_frame(rgb: Tensor) -> Tensor:
    """The 1024x576 frame that ViewCrafter cuts from the middle of a photo ``[3, H, W]`` in [0, 1]: ``[3, 576, 1024]``.

    Both its diffusion stage and, through :func:`network_image`, DUSt3R start from this frame.
    """
    from PIL import Image, ImageOps

    photo = _to_pillow(rgb)
    height, width = VIEWCRAFTER_SIZE
    scale = max(width / photo.width, height / photo.height)
    if photo.width * height > photo.height * width:
        covering = (int(photo.width * scale), height)
    else:
        covering = (width, int(photo.height * scale))
    resized = photo.resize(covering, Image.Resampling.LANCZOS)
    return _from_pillow(ImageOps.fit(resized, (width, height), Image.Resampling.BICUBIC))


def _resize_long_side(photo: Image.Image, long_side: int) -> Image.Image:
    from PIL import Image

    longest = max(photo.size)
    method = Image.Resampling.LANCZOS if longest > long_side else Image.Resampling.BICUBIC
    width, height = (round(side * long_side / longest) for side in photo.size)
    return photo.resize((width, height), method)


def _to_pillow(rgb: Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray((rgb.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def _from_pillow(image: Image.Image) -> Tensor:
    """``[3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
