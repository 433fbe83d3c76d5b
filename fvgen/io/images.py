"""Photographs from files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fvgen.types import ImageSet
from fvgen.utils.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

MIN_SIDE = 16
MAX_PIXELS = 250_000_000
MM_PER_UNIT = {2: 25.4, 3: 10.0, 4: 1.0, 5: 0.001}  # EXIF FocalPlaneResolutionUnit
DIAGONAL_35MM = math.hypot(36.0, 24.0)


def read_images(paths: Sequence[str | PathLike[str]], *, max_side: int | None = None) -> ImageSet:
    """Read photos, turned upright by their EXIF orientation.

    Args:
        paths: image files in any format that Pillow reads.
        max_side: shrink (area average) so that the longer side is at most this many pixels.

    Returns:
        ``rgb [V, 3, H, W]`` float32 in [0, 1]; ``names`` the paths as given; ``focal_px`` from EXIF in pixels of ``rgb``.

    Raises:
        UserError: a file is missing, not a readable image, too small or too big, or the photos differ in size.
    """
    if not paths:
        raise UserError("no photos were given; name at least one image file")
    frames, focals, sizes = [], [], []
    for path in paths:
        rgb, focal = _read(Path(path), max_side)
        frames.append(rgb)
        focals.append(focal)
        sizes.append((rgb.shape[1], rgb.shape[0]))
    for path, size in zip(paths, sizes, strict=True):
        if size != sizes[0]:
            raise UserError(
                f"the photos differ in size: {paths[0]} is {sizes[0][0]}x{sizes[0][1]} and {path} is {size[0]}x{size[1]}; "
                "bring all photos to one size and orientation (only DUSt3R without --cameras takes several)"
            )
    stacked = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float().div_(255.0).contiguous()
    return ImageSet(rgb=stacked, names=tuple(str(p) for p in paths), focal_px=tuple(focals))


def image_size(path: str | PathLike[str]) -> tuple[int, int]:
    """(H, W) of an image file as :func:`read_images` would return it, from its header alone."""
    image = _open(Path(path))
    width, height = image.size
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # reads the pixels of a PNG
    except Exception as error:
        raise UserError(f"{path} is damaged or cut short ({error}); export the photo again") from None
    return (width, height) if turned else (height, width)


def _open(path: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        raise UserError(f"{path} does not exist; check the path of the photo")
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the image files in it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError:
        raise UserError(f"{path} has too many pixels; shrink it below {MAX_PIXELS // 10**6} megapixels") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that can be read; convert it to JPEG or PNG") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); check the file and its permissions") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{path} has too many pixels ({width}x{height}); shrink it below {MAX_PIXELS // 10**6} megapixels"
        ) from None
    if min(width, height) < MIN_SIDE:
        raise UserError(f"{path} is only {width}x{height} pixels; give a photo of at least {MIN_SIDE} pixels a side")
    return image


def _read(path: Path, max_side: int | None) -> tuple[np.ndarray, float | None]:
    from PIL import Image, ImageOps

    image = _open(path)
    try:
        focal = _focal_px(image)
    except (ArithmeticError, KeyError, OSError, SyntaxError, TypeError, ValueError):
        focal = None  # broken EXIF is no reason to refuse the pixels
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            depth16 = np.asarray(image, dtype=np.float32)
            image = Image.fromarray((depth16 / 257.0).clip(0, 255).astype(np.uint8))
        image = image.convert("RGB")
    except Exception as error:
        raise UserError(f"{path} is damaged or cut short ({error}); export the photo again") from None
    width, height = image.size
    if max_side is not None and max(width, height) > max_side:
        scale = max_side / max(width, height)
        image = image.resize((max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BOX)
        focal = None if focal is None else focal * scale
    return np.asarray(image), focal


def _focal_px(image: Image.Image) -> float | None:
    """Focal length in pixels of the file. The 35 mm figure is defined on the diagonal (CIPA DCG-001), which crops keep."""
    from PIL import ExifTags

    base = image.getexif()
    tags: dict[int, Any] = {**base, **base.get_ifd(ExifTags.IFD.Exif)}
    width, height = image.size
    equivalent = float(tags.get(ExifTags.Base.FocalLengthIn35mmFilm) or 0.0)
    focal = equivalent * math.hypot(width, height) / DIAGONAL_35MM
    if not focal:
        millimetres = float(tags.get(ExifTags.Base.FocalLength) or 0.0)
        resolution = float(tags.get(ExifTags.Base.FocalPlaneXResolution) or 0.0)
        unit = MM_PER_UNIT.get(int(tags.get(ExifTags.Base.FocalPlaneResolutionUnit) or 2))
        if not (millimetres and resolution and unit):
            return None
        taken_width = float(tags.get(ExifTags.Base.ExifImageWidth) or width)
        focal = millimetres * resolution / unit * (width / taken_width)
    plausible = math.isfinite(focal) and 0.2 < focal / max(width, height) < 20.0
    return focal if plausible else None
