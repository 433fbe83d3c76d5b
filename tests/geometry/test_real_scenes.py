"""The acceptance figures of the geometry on real captures that are not part of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from fvgen.evaluation.geometry import measure_between

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "first", "last", "psnr", "coverage"),
    [("tum_desk", 0, 15, 25.5, 0.50), ("fox", 0, 7, 31.5, 0.70), ("flowerpot", 0, 2, 26.5, 0.48)],
)
def test_end_photos_predict_the_photos_between(name: str, first: int, last: int, psnr: float, coverage: float) -> None:
    if not (DATA / name / "transforms.json").is_file():
        pytest.skip(f"no captured scene {name} under {DATA}")
    row = measure_between(DATA / name, first, last)
    assert row["psnr_covered"] >= psnr
    assert row["coverage"] >= coverage
    assert row["psnr_covered"] > row["psnr_shared"] + 5


@pytest.mark.parametrize(
    ("name", "first", "last", "psnr"), [("tum_desk", 0, 15, 22.0), ("fox", 0, 7, 29.0), ("flowerpot", 0, 2, 23.0)]
)
def test_without_cameras(name: str, first: int, last: int, psnr: float) -> None:
    if not (DATA / name / "transforms.json").is_file():
        pytest.skip(f"no captured scene {name} under {DATA}")
    row = measure_between(DATA / name, first, last, known_cameras=False)
    assert row["psnr_covered"] >= psnr
    assert row["coverage"] >= 0.4
