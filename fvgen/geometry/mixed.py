"""Photos that differ in size: geometry sees them whole, everything else sees them cut to the frame of the first."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from fvgen.io import read_images
from fvgen.types import ImageSet

from .resize import fit


def read_mixed_images(paths: Sequence[str | os.PathLike[str]]) -> ImageSet:
    """As :func:`fvgen.io.read_images`, but sizes and orientations may differ; see :func:`in_first_frame`."""
    return in_first_frame([read_images([path]) for path in paths]) if paths else read_images(paths)


def in_first_frame(photos: Sequence[ImageSet]) -> ImageSet:
    """One set of sets of one photo each. Photos of another size than the first are scaled to cover it, and their centre is cut.

    Args:
        photos: ``rgb [1, 3, h, w]`` each.

    Returns:
        ``rgb [V, 3, H, W]`` with the size of the first; in ``whole`` the uncut photos, if there are several sizes.
    """
    size = photos[0].size
    cut, focals = [], []
    for photo in photos:
        cut.append(fit(photo, None, size)[0].rgb)
        scale = max(size[0] / photo.size[0], size[1] / photo.size[1])
        focals += [None if focal is None else focal * scale for focal in photo.focal_px]
    mixed = any(photo.size != size for photo in photos)
    names = tuple(name for photo in photos for name in photo.names)
    return ImageSet(torch.cat(cut), names, tuple(focals), tuple(photo.rgb[0] for photo in photos) if mixed else ())
