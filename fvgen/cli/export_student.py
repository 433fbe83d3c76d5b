"""``fvgen export-student``: a trained student as a model directory."""

from __future__ import annotations

import argparse
from pathlib import Path

from fvgen.io.outputs import check_place
from fvgen.pipeline import find_model
from fvgen.utils.errors import UserError


def run(arguments: argparse.Namespace) -> None:
    """Writes the model directory."""
    output = Path(arguments.output)
    if output.exists() and not arguments.overwrite:
        raise UserError(f"the output directory {output} exists; choose another --output or add --overwrite")
    check_place(output)
    import torch

    from fvgen.distill.checkpoint import read_state
    from fvgen.distill.export import export_student
    from fvgen.distill.folder import find_checkpoint
    from fvgen.models.bundle import ModelBundle

    found = find_checkpoint(Path(arguments.run))
    teacher = arguments.teacher or read_state(found)["run"]["teacher"]
    dtype = {"float16": torch.float16, "float32": torch.float32}[arguments.dtype]
    export_student(found, ModelBundle.from_pretrained(find_model(teacher)), output, arguments.ema, dtype, arguments.teacher_share)
    print(f"model      {output}")
    print(f"from       {found}, {'averaged weights' if arguments.ema else 'weights without averaging'}")
    if arguments.teacher_share:
        print(f"           with {100 * arguments.teacher_share:g} % of the teacher")
