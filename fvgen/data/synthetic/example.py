"""A small example scene on disk: two photos, the true frames between them and all cameras.

photos/0000.jpg, 0001.jpg     640 x 400
frames/0000.png ... 0015.png  256 x 160; the first and last are taken from the photos' places
transforms.json               the photos' cameras first, then the frames'

Written by ``python -m fvgen.data.synthetic.example DIRECTORY --seed N``.
"""

from __future__ import annotations

import argparse
import json
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fvgen.data.synthetic.pairs import intrinsics
from fvgen.data.synthetic.raycast import render_view
from fvgen.data.synthetic.world import Paths, Worlds, sample_paths, sample_worlds
from fvgen.io import write_transforms
from fvgen.io.video import to_uint8, write_frames
from fvgen.types import Cameras

# Far above the worlds of training and evaluation; picked among many for good coverage, so its scores are no average.
SEED = (1 << 41) + 9937
FRAMES, FRAME_SIZE, PHOTO_SIZE = 16, (160, 256), (400, 640)
_SUPERSAMPLING = 2


def example_frames(paths: Paths, worlds: Worlds, which: list[int], size: tuple[int, int]) -> tuple[Tensor, Cameras]:
    """Antialiased views ``[N, 3, H, W]`` from the positions ``which`` of the path, and their cameras."""
    fine = (size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING)
    poses = paths.world_from_cam[:, which]
    views = [render_view(worlds, pose, intrinsics(paths.focal, fine), fine)[0] for pose in poses.unbind(1)]
    K = intrinsics(paths.focal, size).expand(len(which), 3, 3).contiguous()
    return F.avg_pool2d(torch.cat(views), _SUPERSAMPLING), Cameras(K, poses[0], size)


@torch.inference_mode()
def write_example(directory: str | PathLike[str], seed: int = SEED) -> None:
    """Writes the scene of the synthetic world ``seed``; ``directory`` must not hold one yet."""
    from PIL import Image

    root = Path(directory)
    seeds = torch.tensor([seed])
    paths = sample_paths(seeds, FRAMES)
    worlds = sample_worlds(seeds, paths)
    photos, photo_cameras = example_frames(paths, worlds, [0, FRAMES - 1], PHOTO_SIZE)
    frames, frame_cameras = example_frames(paths, worlds, list(range(FRAMES)), FRAME_SIZE)
    write_frames(root / "frames", frames)
    (root / "photos").mkdir()
    names = [f"photos/{i:04d}.jpg" for i in range(len(photos))]
    for name, pixels in zip(names, to_uint8(photos), strict=True):
        Image.fromarray(pixels).save(root / name, quality=95)
    listed = []
    for cameras, files in ((photo_cameras, names), (frame_cameras, [f"frames/{i:04d}.png" for i in range(FRAMES)])):
        write_transforms(root / "transforms.json", cameras, files)
        listed += json.loads((root / "transforms.json").read_text())["frames"]
    data = {"camera_model": "PINHOLE", "frames": listed}
    (root / "transforms.json").write_text(json.dumps(data, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fvgen.data.synthetic.example", description="Writes the example scene.")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("--seed", type=int, default=SEED, help="number of the synthetic world (default: %(default)s)")
    arguments = parser.parse_args()
    write_example(arguments.directory, arguments.seed)


if __name__ == "__main__":
    main()
