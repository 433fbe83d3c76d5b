"""How well the two end photos of a capture predict the photos between them, through geometry alone.

``python -m fvgen.evaluation.geometry SCENE_DIR FIRST LAST`` prints a table. SCENE_DIR holds ``images/`` and ``transforms.json``;
FIRST and LAST count the image files in name order from 0.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fvgen.geometry import estimate_scene
from fvgen.geometry.features import detect, match, to_bytes
from fvgen.geometry.resize import limit_long_side
from fvgen.io import read_cameras, read_images
from fvgen.render import render_scene
from fvgen.types import Cameras, ImageSet, Scene
from fvgen.utils.errors import UserError


def measure_between(
    scene_dir: str | Path,
    first: int,
    last: int,
    *,
    known_cameras: bool = True,
    fill: bool = False,
    long_side: int = 448,
    compositor: str = "norm",
) -> dict[str, Any]:
    """Point renders from the two end photos against the photos between them.

    Only the two end photos, and with ``known_cameras`` their two cameras, reach the geometry. Without known cameras each
    photo between is registered to the estimated scene by its own sparse matches (the estimated world is not the true one, so
    true cameras would not fit it).

    Returns:
        ``psnr_covered`` dB, mean over the photos between of the PSNR over covered pixels; ``coverage`` mean fraction of covered
        pixels; ``nearest_psnr`` dB of copying the closer end photo; ``psnr_shared`` dB of that copy over the covered pixels only;
        ``seconds`` for the geometry; ``quality``.
    """
    folder = Path(scene_dir)
    names = sorted(str(p) for p in (folder / "images").iterdir())[first : last + 1]
    if len(names) < 3:
        raise UserError(f"there is no photo between {first} and {last} in {folder}; choose numbers further apart")
    images = read_images(names)
    cameras = read_cameras(folder / "transforms.json", names, images.size)
    ends = [0, len(names) - 1]
    pair = ImageSet(images.rgb[ends], (names[0], names[-1]), tuple(images.focal_px[i] for i in ends))
    start = time.perf_counter()
    scene = estimate_scene(pair, cameras[ends] if known_cameras else None, fill=fill, long_side=long_side)
    seconds = time.perf_counter() - start
    truth, truth_cameras = limit_long_side(images, cameras, long_side)
    assert truth_cameras is not None
    between = list(range(1, len(names) - 1))
    target = truth_cameras[between] if known_cameras else _registered(scene, truth.rgb[between])
    clip = render_scene(*scene.cloud(), target, compositor=compositor)
    wanted = truth.rgb[between]
    nearest = truth.rgb[[ends[0] if i <= ends[1] / 2 else ends[1] for i in between]]
    everywhere = torch.ones_like(clip.coverage)
    return {
        "psnr_covered": _mean_psnr(clip.rgb, wanted, clip.coverage),
        "coverage": float(clip.coverage.float().mean()),
        "nearest_psnr": _mean_psnr(nearest, wanted, everywhere),
        "psnr_shared": _mean_psnr(nearest, wanted, clip.coverage),
        "seconds": seconds,
        "quality": scene.quality,
    }


def _registered(scene: Scene, photos: Tensor) -> Cameras:
    """Cameras of ``photos [T, 3, H, W]`` in the scene's world, from their SIFT matches with the scene's photos (PnP)."""
    import cv2

    K = scene.cameras.K[0].double().numpy()
    known = [detect(to_bytes(rgb)) for rgb in scene.images.rgb]
    poses = []
    for rgb in photos:
        found = detect(to_bytes(rgb))
        world, pixels = [], []
        for features, points, confidence in zip(known, scene.points.numpy(), scene.confidence.numpy(), strict=True):
            pairs = match(features, found)
            column, row = np.floor(features.xy[pairs[:, 0]]).astype(int).T
            sure = confidence[row, column] > 0
            world.append(points[row, column][sure].astype(np.float64))
            pixels.append(found.xy[pairs[:, 1]][sure])
        fit = (np.concatenate(world), np.concatenate(pixels), K, None)
        cv2.setRNGSeed(0)
        _, turn, shift, inliers = cv2.solvePnPRansac(*fit, iterationsCount=2000, reprojectionError=2.0)
        kept = inliers.ravel()
        turn, shift = cv2.solvePnPRefineLM(fit[0][kept], fit[1][kept], K, None, turn, shift)
        cam_from_world = np.eye(4)
        cam_from_world[:3, :3], cam_from_world[:3, 3] = cv2.Rodrigues(turn)[0], shift.ravel()
        poses.append(np.linalg.inv(cam_from_world))
    return Cameras(
        scene.cameras.K[:1].expand(len(poses), 3, 3).clone(), torch.from_numpy(np.stack(poses)).float(), scene.cameras.image_size
    )


def _mean_psnr(images: Tensor, wanted: Tensor, mask: Tensor) -> float:
    """Mean over images ``[V, 3, H, W]`` of the PSNR over ``mask [V, H, W]``, dB; NaN where nothing is covered."""
    error = ((images - wanted) ** 2).mean(1)
    per_image = [-10 * torch.log10(e[m].mean()) for e, m in zip(error, mask, strict=True)]
    return float(torch.stack(per_image).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene_dir")
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--long-side", type=int, default=448)
    parser.add_argument("--compositor", default="norm", choices=("norm", "alpha"))
    options = parser.parse_args(arguments)
    print(
        f"{'cameras':10} {'fill':5} {'covered dB':>10} {'coverage %':>10} {'nearest dB':>10} {'tracks':>6} {'angle':>6} {'s':>5}"
    )
    for known in (True, False):
        for fill in (False, True):
            row = measure_between(
                options.scene_dir,
                options.first,
                options.last,
                known_cameras=known,
                fill=fill,
                long_side=options.long_side,
                compositor=options.compositor,
            )
            quality = row["quality"]
            print(
                f"{'known' if known else 'estimated':10} {'yes' if fill else 'no':5} {row['psnr_covered']:10.2f} "
                f"{100 * row['coverage']:10.1f} {row['nearest_psnr']:10.2f} {quality.shared_tracks:6d} "
                f"{quality.triangulation_angle_deg:6.1f} {row['seconds']:5.2f}"
            )


if __name__ == "__main__":
    main()
