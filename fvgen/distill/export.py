"""A student as a model directory."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fvgen.distill import checkpoint
from fvgen.io.durable import write_json_durably
from fvgen.models.bundle import ModelBundle


def export_student(
    found: Path,
    bundle: ModelBundle,
    output: Path,
    average: bool = True,
    dtype: torch.dtype | None = torch.float16,
    teacher_share: float = 0.0,
) -> dict[str, Any]:
    """Writes the student of a checkpoint with the other parts of its teacher; returns where it comes from.

    Args:
        found: the checkpoint.
        bundle: its teacher's model; the UNet's weights are replaced.
        output: model directory to write.
        average: the running average of the student's weights, or the weights themselves.
        dtype: of the stored weights; None keeps each part's own.
        teacher_share: part of the teacher in the weights, which are the mean of both (WiSE-FT, arXiv 2109.01903): a little of it
            gives softer frames with a higher PSNR.

    Raises:
        UserError: the checkpoint is damaged or of another model, or ``output`` holds something else.
    """
    state = checkpoint.read_state(found)
    weights = checkpoint.read_tensors(found, "ema" if average else "student")
    teacher = copy.deepcopy(bundle.unet.float())
    checkpoint.restore(checkpoint.module_tensors(bundle.unet), weights, "student")
    with torch.no_grad():
        for ours, theirs in zip(bundle.unet.parameters(), teacher.parameters(), strict=True):
            ours.lerp_(theirs, teacher_share)
    settings = state["run"]["settings"]
    bundle.index = replace(
        bundle.index, sampler="few_step", steps=len(settings["times"]), guidance_scale=1.0, guidance_rescale=0.0
    )
    bundle.save_pretrained(output, dtype)
    names = ("stage", "iteration", "samples")
    how = {"checkpoint": found.name, "average": average, "teacher_share": teacher_share}
    origin = {**how, **{k: state[k] for k in names}, "run": state["run"]}
    write_json_durably(output / "distillation.json", origin)
    return origin
