"""The fixed held-out clips of the synthetic world and what a model scores on them.

``python -m fvgen.evaluation.heldout MODEL_DIR`` prints a table; ``--json`` also writes the headline figures as records.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fvgen.data.synthetic import synthetic_pairs
from fvgen.data.synthetic.pairs import ClipPairs
from fvgen.evaluation.metrics import mean_psnr
from fvgen.evaluation.provenance import provenance
from fvgen.models.bundle import ModelBundle
from fvgen.sampling import ModelSampler
from fvgen.utils.errors import UserError

HELD_OUT_SEED = 1 << 40  # training worlds are numbered elsewhere
ROWS = {
    "render": "point render",
    "generated": "generated, 4 steps",
    "fast": "generated, fast mode",
    "teacher4": "DDIM, 4 steps",
    "teacher50": "DDIM, 50 steps",
    "vae": "truth through the VAE",
}
RECORDS = {
    "tiny_psnr_generated": "generated",
    "tiny_psnr_fast": "fast",
    "tiny_psnr_render": "render",
    "tiny_vae_psnr": "vae",
}


def held_out_scores(
    bundle: ModelBundle,
    clips: int = 64,
    batch: int = 8,
    seed: int = 0,
    guidance: float | None = None,
    ddim_steps: Sequence[int] = (4, 50),
    teacher: ModelBundle | None = None,
) -> dict[str, float]:
    """Scores on held-out synthetic clips, dB, over the frames between the two photos.

    Args:
        bundle: the model, on the device that is to do the work.
        clips: how many worlds, from ``HELD_OUT_SEED`` on.
        batch: clips at once.
        seed: of the sampling noise.
        guidance: guidance scale of the DDIM rows; None takes the model's own.
        ddim_steps: numbers of DDIM steps to score.
        teacher: sampled in the DDIM rows, with the same VAE; None for the model itself.

    Returns:
        ``render``, ``generated`` (4 steps), ``fast`` (in fast mode), ``teacher{n}`` (n DDIM steps) and ``vae`` (encoding and
        decoding the truth): mean
        PSNR per frame over the whole frame, and for all of them ``*_covered`` and ``*_uncovered`` over the pixels with and
        without a point; ``coverage``: share of covered pixels.

    Raises:
        UserError: fewer than one clip, or clips without a frame between the photos.
    """
    if clips < 1 or batch < 1 or bundle.index.frames < 3:
        raise UserError(f"scoring needs at least one clip of three frames, got {clips} of {bundle.index.frames}; ask for more")
    sampler, fast = ModelSampler(bundle, seed), ModelSampler(bundle, seed, fast=True)
    slow = sampler if teacher is None else ModelSampler(teacher, seed)
    scale = bundle.index.guidance_scale if guidance is None else guidance
    values: dict[str, list[float]] = {}
    for pairs in _held_out_pairs(bundle, clips, batch, sampler.device):
        condition = sampler.condition(pairs.render, guidance=scale != 1.0)
        videos = {"render": pairs.render, "generated": sampler.decode(sampler.few_step(condition))}
        videos["fast"] = sampler.decode(fast.few_step(condition))
        videos |= {f"teacher{n}": sampler.decode(slow.ddim(condition, n, scale)) for n in ddim_steps}
        videos["vae"] = sampler.reconstruct(pairs.target)
        for name, video in videos.items():
            for key, psnr in clip_scores(name, video, pairs.target, pairs.coverage).items():
                values.setdefault(key, []).extend(psnr)
        values.setdefault("coverage", []).extend(pairs.coverage[:, 1:-1].float().mean((1, 2, 3)).tolist())
    return {name: float(torch.tensor(v, dtype=torch.float64).nanmean()) for name, v in values.items()}


def _held_out_pairs(bundle: ModelBundle, clips: int, batch: int, device: torch.device) -> Iterator[ClipPairs]:
    index = bundle.index
    for first in range(0, clips, batch):
        seeds = torch.arange(first, min(first + batch, clips), device=device) + HELD_OUT_SEED
        yield synthetic_pairs(seeds, (index.height, index.width), index.frames, compositor=index.compositor)


def clip_scores(name: str, video: Tensor, truth: Tensor, covered: Tensor) -> dict[str, list[float]]:
    """Mean PSNR of each clip without its first and last frame, dB: whole frame, and with and without a point.

    Args:
        name: key of the result.
        video, truth: ``[B, T, 3, H, W]`` in [0, 1].
        covered: ``[B, T, H, W]`` bool.

    Returns:
        ``name``, ``name_covered`` and ``name_uncovered``, ``B`` numbers each; NaN where no pixel is of that kind.
    """
    masks = {name: None, f"{name}_covered": covered[:, 1:-1], f"{name}_uncovered": ~covered[:, 1:-1]}
    video, truth = video[:, 1:-1], truth[:, 1:-1]
    return {
        key: [mean_psnr(video[b], truth[b], None if mask is None else mask[b]) for b in range(len(video))]
        for key, mask in masks.items()
    }


def table(scores: dict[str, float], rows: dict[str, str]) -> str:
    """The scores as text: one line for each of ``rows`` (key to label) that was scored."""
    lines = [f"{'PSNR, dB':24} {'whole':>7} {'covered':>8} {'uncovered':>10}"]
    for key, label in rows.items():
        if key in scores:
            whole, covered, uncovered = (scores[f"{key}{end}"] for end in ("", "_covered", "_uncovered"))
            lines.append(f"{label:24} {whole:7.2f} {covered:8.2f} {uncovered:10.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir")
    parser.add_argument("--teacher", help="model directory whose DDIM samples are scored (default: the model itself)")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", type=Path, help="write the headline figures here")
    options = parser.parse_args(arguments)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    try:
        bundle = ModelBundle.from_pretrained(options.model_dir, device)
        teacher = ModelBundle.from_pretrained(options.teacher, device) if options.teacher else None
        scores = held_out_scores(bundle, options.clips, options.batch, teacher=teacher)
    except UserError as error:
        parser.error(str(error))
    print(table(scores, ROWS))
    print(
        f"\nMean over the frames between the two photos of {options.clips} clips. Their worlds are not in the training data but\n"
        f"come from the same generator. Points cover {100 * scores['coverage']:.0f} % of the pixels."
    )
    if options.json:
        words = ["python", "-m", "fvgen.evaluation.heldout", options.model_dir, "--clips", str(options.clips)]
        command = shlex.join([*words, *(["--teacher", options.teacher] if options.teacher else [])])
        context = {"clips": options.clips, **provenance(command)}
        records = [{"name": name, "value": scores[key], "unit": "dB", **context} for name, key in RECORDS.items()]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
