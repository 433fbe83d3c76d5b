"""Scores on real captures that are not part of the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from fvgen.evaluation.real_clips import load_real_clip, real_clip_scores
from fvgen.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DATA, MODEL = ROOT.parent / "shared" / "data", ROOT / "fvgen" / "assets" / "tiny"


def _scene(name: str) -> Path:
    if not (DATA / name / "transforms.json").is_file():
        pytest.skip(f"no captured scene {name} under {DATA}")
    return DATA / name


@pytest.mark.slow
@pytest.mark.parametrize(("name", "first", "last"), [("tum_desk", 0, 15), ("fox", 0, 7)])
def test_the_bundled_model_beats_render_and_nearer_photo(name: str, first: int, last: int) -> None:
    scene = _scene(name)
    if not (MODEL / "model_index.json").is_file():
        pytest.skip(f"no bundled model at {MODEL}")
    scores = real_clip_scores(MODEL, scene, first, last)
    assert scores["generated"] >= scores["render"] + 3
    assert scores["generated"] >= scores["nearest"] + 3


@pytest.mark.slow
def test_portrait_photos_make_a_portrait_clip() -> None:
    clip = load_real_clip(_scene("fox"), 0, 2, [(160, 256), (256, 160)])
    assert clip.truth.shape == clip.renders.rgb.shape == (3, 3, 256, 160)
    assert clip.renders.cameras.image_size == (256, 160)
    assert (clip.renders.rgb[[0, -1]] == clip.truth[[0, -1]]).all()
    assert (clip.nearest()[[0, 2]] == clip.truth[[0, 2]]).all()


def test_bad_scenes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder images"):
        load_real_clip(tmp_path, 0, 5, [(160, 256)])
    (tmp_path / "images").mkdir()
    for n in range(4):
        (tmp_path / "images" / f"{n}.png").touch()
    for first, last in ((0, 1), (2, 1), (-1, 2), (1, 4)):
        with pytest.raises(UserError, match="has photos 0 to 3"):
            load_real_clip(tmp_path, first, last, [(160, 256)])
