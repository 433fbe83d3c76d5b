"""The models that come with the package."""

from __future__ import annotations

import torch

from fvgen.models.bundle import ModelBundle
from fvgen.pipeline import BUNDLED


def test_student_and_teacher_fit_into_16_mb() -> None:
    assert sum(f.stat().st_size for folder in BUNDLED.values() for f in folder.rglob("*") if f.is_file()) <= 16e6


def test_the_student_is_not_its_teacher() -> None:
    student, teacher = (ModelBundle.from_pretrained(BUNDLED[name]) for name in ("tiny", "tiny_teacher"))
    assert (student.index.sampler, student.index.steps) == ("few_step", 4)
    assert (teacher.index.sampler, teacher.index.steps) == ("ddim", 50)
    assert torch.equal(next(student.vae.parameters()), next(teacher.vae.parameters()))
    pairs = zip(student.unet.parameters(), teacher.unet.parameters(), strict=True)
    changed = [float((a - b).detach().abs().max()) for a, b in pairs]
    assert 0 < max(changed) < 1e-2  # a few hundred small steps apart
