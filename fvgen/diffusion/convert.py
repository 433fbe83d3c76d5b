"""A ViewCrafter checkpoint file to a teacher's model bundle."""

from __future__ import annotations

import os
from dataclasses import replace

from fvgen.models.bundle import ModelBundle
from fvgen.models.checkpoint import convert_reference, read_reference_checkpoint
from fvgen.models.spec import ModelSpec

from .schedule import check_buffers


def convert_checkpoint(path: str | os.PathLike[str], spec: ModelSpec, keep_text_tower: bool = False) -> ModelBundle:
    """Read, check against the schedule that is going to be used, convert; the index gets the teacher's sampling defaults.

    The weights are the file's, mapped into memory, in its precision; ``keep_text_tower`` as of :func:`convert_reference`.

    Raises:
        UserError: the file is no such checkpoint, or belongs to another preset.
    """
    state = read_reference_checkpoint(path)
    check_buffers(state, spec.index.base_scale)
    bundle = convert_reference(state, spec, keep_text_tower)
    bundle.index = replace(bundle.index, sampler="ddim", steps=50, guidance_scale=7.5, guidance_rescale=0.7, eta=1.0)
    return bundle
