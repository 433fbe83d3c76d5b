"""What a model makes of a real capture: two end photos with known cameras in, the photos between them as the truth.

``python -m fvgen.evaluation.real_clips MODEL_DIR SCENE_DIR FIRST LAST`` prints a table. SCENE_DIR holds ``images/`` and
``transforms.json``; FIRST and LAST count the image files in name order from 0.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fvgen.evaluation.heldout import clip_scores, table
from fvgen.geometry import estimate_scene
from fvgen.geometry.resize import fit
from fvgen.io import read_cameras, read_images
from fvgen.io.contact_sheet import write_contact_sheet
from fvgen.models.bundle import ModelBundle
from fvgen.render import put_photos, render_scene
from fvgen.sampling import ModelSampler
from fvgen.types import ImageSet, RenderClip
from fvgen.utils.errors import UserError

ROWS = {
    "nearest": "copy of the nearer photo",
    "render": "point render",
    "generated": "generated",
    "vae": "truth through the VAE",
}


@dataclass(frozen=True)
class RealClip:
    """A stretch of a capture at a model's clip size.

    Attributes:
        truth: ``[T, 3, H, W]`` the photos.
        renders: point renders from the two end photos, which stand at both ends.
    """

    truth: Tensor
    renders: RenderClip

    def nearest(self) -> Tensor:
        """The closer end photo for every frame, ``[T, 3, H, W]``."""
        last = len(self.truth) - 1
        return self.truth[[0 if t <= last / 2 else last for t in range(last + 1)]]


def load_real_clip(
    scene_dir: str | os.PathLike[str],
    first: int,
    last: int,
    sizes: Sequence[tuple[int, int]],
    compositor: str = "norm",
    device: str | torch.device = "cpu",
) -> RealClip:
    """Photos ``first`` to ``last`` and the renders along their true cameras; only the two ends reach the geometry.

    Args:
        scene_dir: holds ``images/`` and ``transforms.json``.
        first, last: numbers of the photos in name order, from 0, both included.
        sizes: (H, W) of the clips the model makes; the one closest to the photos' aspect is taken.
        compositor: how points are blended.
        device: where the points are rendered and the result lies.

    Raises:
        UserError: no such photos or cameras, no photo between the two, or geometry that fails.
    """
    folder = Path(scene_dir)
    if not (folder / "images").is_dir():
        raise UserError(f"{folder} has no folder images; give a scene with images and transforms.json")
    names = sorted(str(p) for p in (folder / "images").iterdir())
    if not 0 <= first < last < len(names) or last - first < 2:
        raise UserError(f"there must be a photo between {first} and {last}, and {folder} has photos 0 to {len(names) - 1}")
    names = names[first : last + 1]
    images = read_images(names)
    cameras = read_cameras(folder / "transforms.json", names, images.size)
    ends = [0, len(names) - 1]
    pair = ImageSet(images.rgb[ends], (names[0], names[-1]), tuple(images.focal_px[i] for i in ends))
    scene = estimate_scene(pair, cameras[ends])
    aspect = images.size[0] / images.size[1]
    size = min(sizes, key=lambda s: abs(s[0] / s[1] - aspect))
    fitted, path = fit(images, cameras, size)
    assert path is not None
    truth = fitted.rgb.to(device)
    points, rgb = (x.to(device) for x in scene.cloud())
    renders = render_scene(points, rgb, path.to(str(device)), compositor=compositor)
    return RealClip(truth, put_photos(renders, truth[ends], ends))


def real_clip_scores(
    bundle_or_dir: ModelBundle | str | os.PathLike[str],
    scene_dir: str | os.PathLike[str],
    first: int,
    last: int,
    steps: int = 4,
    seed: int = 0,
    device: str | torch.device = "cpu",
    sheet: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Scores of a model on real photos, dB, over the frames strictly between the two that it is given.

    Args:
        bundle_or_dir: a model (it is moved to ``device``) or its directory.
        scene_dir, first, last: see :func:`load_real_clip`; the clip has ``last - first + 1`` frames.
        steps: network calls.
        seed: of the sampling noise.
        device: "cpu", "cuda", ...
        sheet: PNG to write, with rows of photos, renders, generated and true frames.

    Returns:
        ``generated``, ``render``, ``nearest`` (copy of the nearer photo) and ``vae`` (truth encoded and decoded): mean PSNR per
        whole frame; for each also ``*_covered`` and ``*_uncovered`` over pixels with and without a point; ``coverage``: share of
        the former.

    Raises:
        UserError: bad model, scene or numbers.
    """
    if isinstance(bundle_or_dir, ModelBundle):
        bundle = bundle_or_dir.to(device)
    else:
        bundle = ModelBundle.from_pretrained(bundle_or_dir, device)
    index = bundle.index
    clip = load_real_clip(scene_dir, first, last, index.sizes(), index.compositor, device)
    sampler = ModelSampler(bundle, seed)
    videos = {
        "nearest": clip.nearest(),
        "render": clip.renders.rgb,
        "generated": sampler.decode(sampler.few_step(sampler.condition(clip.renders.rgb), steps))[0],
        "vae": sampler.reconstruct(clip.truth)[0],
    }
    scores = {"coverage": float(clip.renders.coverage[1:-1].float().mean())}
    for name, video in videos.items():
        found = clip_scores(name, video[None], clip.truth[None], clip.renders.coverage[None])
        scores |= {key: values[0] for key, values in found.items()}
    if sheet is not None:
        shown = {
            "input photos": clip.truth[[0, -1]],
            f"point renders, {scores['render']:.1f} dB": clip.renders.rgb,
            f"generated in {steps} steps, {scores['generated']:.1f} dB": videos["generated"],
            "true photos": clip.truth,
        }
        write_contact_sheet(Path(sheet), [(label, frames.cpu()) for label, frames in shown.items()])
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("scene_dir")
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--sheet", type=Path, help="PNG to write")
    options = parser.parse_args(arguments)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    clip = (options.scene_dir, options.first, options.last)
    try:
        scores = real_clip_scores(options.model_dir, *clip, options.steps, options.seed, device, options.sheet)
    except UserError as error:
        parser.error(str(error))
    print(table(scores, ROWS))
    print(f"points cover {100 * scores['coverage']:.0f} % of the pixels")


if __name__ == "__main__":
    main()
