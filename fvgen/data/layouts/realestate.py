"""RealEstate10K (arXiv 1805.09817): one text file per clip, its frames in a folder of the same name beside it.

First line: the video's address. Then one line per frame with 19 columns: timestamp in microseconds, which is the frame's file
name; focal lengths x, y and principal point x, y in fractions of the image's width and height; two zeros; the 3x4 world-to-camera
matrix by rows, OpenCV axes. https://google.github.io/realestate10k/download.html
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fvgen.data.layouts.capture import Capture, Frame, find_images
from fvgen.geometry.conventions import invert_rigid, rigid
from fvgen.io.cameras import CameraEntry
from fvgen.io.images import image_size
from fvgen.utils.errors import UserError

_COLUMNS = 19


def is_realestate(file: Path) -> bool:
    """Whether a text file lists cameras in this format and has a folder for its frames."""
    if not file.with_suffix("").is_dir():
        return False
    with file.open(encoding="utf-8", errors="replace") as lines:
        next(lines, "")
        return len(next(lines, "").split()) == _COLUMNS


def realestate_capture(name: str, file: Path, size: tuple[int, int]) -> Capture:
    """See :func:`fvgen.data.layouts.read_capture`; frames in the order of their timestamps."""
    rows = {}
    try:
        for line in file.read_text(encoding="utf-8").splitlines()[1:]:
            if line.strip():
                stamp, *numbers = line.split()
                rows[int(stamp)] = np.array([float(n) for n in numbers])
                if len(numbers) != _COLUMNS - 1:
                    raise ValueError(f"{len(numbers) + 1} columns instead of {_COLUMNS}")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a RealEstate10K camera file ({error}); download it again") from None
    stamps = sorted(rows)
    images = find_images(file.parent, [f"{file.stem}/{stamp}" for stamp in stamps], size)
    first = next((image for image in images if image is not None), None)
    if first is None:
        return Capture(name, "realestate10k", file, (), len(stamps))
    height, width = image_size(first)
    frames = []
    for time, image in zip(stamps, images, strict=True):
        if image is not None:
            fx, fy, cx, cy = rows[time][:4]
            K = np.diag([width, height, 1.0]) @ np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
            camera_from_world = torch.from_numpy(rows[time][6:].reshape(3, 4))
            pose = invert_rigid(rigid(camera_from_world[:, :3], camera_from_world[:, 3])).numpy()
            frames.append(Frame(image, CameraEntry(str(time), pose, K, (height, width))))
    return Capture(name, "realestate10k", file, tuple(frames), len(stamps) - len(frames))
