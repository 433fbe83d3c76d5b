"""One picture that shows the whole run: photos, renders and generated frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fvgen.io.video import to_uint8

if TYPE_CHECKING:
    from PIL import Image

_COLUMNS = 6
_LABEL = 18


def write_contact_sheet(path: Path, rows: Sequence[tuple[str, Tensor]]) -> None:
    """Writes the picture of :func:`draw_contact_sheet` as a PNG."""
    draw_contact_sheet(rows).save(path)


def draw_contact_sheet(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """Stacks labelled rows of frames; longer rows are thinned out evenly, first and last kept.

    Args:
        rows: (label, ``[N, 3, H, W]`` in [0, 1]) with one H and W for all rows.
    """
    from PIL import Image, ImageDraw

    height, width = rows[0][1].shape[-2:]
    columns = min(_COLUMNS, max(len(frames) for _, frames in rows))
    sheet = np.full(((height + _LABEL) * len(rows), columns * width + (columns - 1) * 2, 3), 255, np.uint8)
    for r, (_, frames) in enumerate(rows):
        picked = torch.linspace(0, len(frames) - 1, min(columns, len(frames))).round().long()
        top = r * (height + _LABEL) + _LABEL
        # a short row spreads over the sheet so that its ends stand above the ends of the longer ones
        slots = (
            torch.linspace(0, columns - 1, len(picked)).round().long() if len(picked) > 1 else torch.zeros(1, dtype=torch.long)
        )
        for slot, frame in zip(slots.tolist(), to_uint8(frames[picked]), strict=True):
            sheet[top : top + height, slot * (width + 2) : slot * (width + 2) + width] = frame
    image = Image.fromarray(sheet)
    draw = ImageDraw.Draw(image)
    for r, (label, _) in enumerate(rows):
        draw.text((4, r * (height + _LABEL) + 3), label, fill=(0, 0, 0))
    return image
