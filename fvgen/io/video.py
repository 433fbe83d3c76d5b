"""Frames to MP4 and PNG, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor


def to_uint8(rgb: Tensor) -> np.ndarray:
    """``[..., 3, H, W]`` in [0, 1] to ``[..., H, W, 3]`` uint8, rounded."""
    return (rgb.detach().float().clamp(0, 1) * 255 + 0.5).byte().movedim(-3, -1).cpu().numpy()


def write_frames(directory: Path, rgb: Tensor) -> None:
    """Writes ``[T, 3, H, W]`` in [0, 1] as ``0000.png``, ``0001.png``, ..."""
    from PIL import Image

    directory.mkdir(parents=True)
    for i, frame in enumerate(to_uint8(rgb)):
        Image.fromarray(frame).save(directory / f"{i:04d}.png")


def write_video(path: Path, rgb: Tensor, fps: int = 10) -> None:
    """Writes ``[T, 3, H, W]`` in [0, 1] as H.264 with PyAV, or as MPEG-4 with OpenCV where PyAV is not installed.

    The same frames give the same bytes: one encoder thread, and no macroblock tree, whose assembler in x264 reads beyond what
    was written, so that a few in a hundred clips came out otherwise.
    """
    frames = to_uint8(rgb)
    try:
        import av
    except ImportError:
        _write_with_opencv(path, frames, fps)
        return
    height, width = frames.shape[1:3]
    with av.open(str(path), "w") as container:
        options = {"crf": "14", "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width - width % 2, height - height % 2, "yuv420p"
        for frame in frames:
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[: stream.height, : stream.width]), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())


def _write_with_opencv(path: Path, frames: np.ndarray, fps: int) -> None:
    import cv2

    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise RuntimeError("no video encoder found; install PyAV with `pip install av`")
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
