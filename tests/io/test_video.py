"""Videos: what is read back is what was written, and the same frames give the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fvgen.io.video import write_video


def spotted(frames: int, height: int, width: int) -> torch.Tensor:
    """Random pixels and black ones, like renders of few points: hard to encode."""
    draw = torch.Generator().manual_seed(0)
    colours = torch.rand(frames, 3, height, width, generator=draw)
    return colours * (torch.rand(frames, 1, height, width, generator=draw) > 0.5)


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """Also where the memory between the calls was used for other things."""
    pytest.importorskip("av", reason="PyAV is not installed")
    rgb, seen = spotted(4, 120, 192), set()
    for n in range(40):
        used = [torch.randn(64 * (1 + n)) for _ in range(50)]
        write_video(tmp_path / "clip.mp4", rgb)
        seen.add((tmp_path / "clip.mp4").read_bytes())
        del used
    assert len(seen) == 1


def test_frames_come_back(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    ramp = torch.linspace(0, 1, 64).expand(3, 48, 64)
    rgb = torch.stack([ramp * (0.5 + 0.1 * t) for t in range(5)])
    write_video(tmp_path / "clip.mp4", rgb, fps=5)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == 5
        read = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    found = torch.stack(read).permute(0, 3, 1, 2) / 255
    assert found.shape == rgb.shape
    assert (found - rgb).abs().mean() < 0.01
