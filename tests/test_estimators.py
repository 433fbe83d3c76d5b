"""Which geometry is taken, and what of it reaches the pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fvgen.estimators import ClassicalEstimator, Dust3rEstimator, make_estimator
from fvgen.pipeline import FVGenPipeline, prepare
from fvgen.types import ImageSet
from fvgen.utils.errors import UserError
from tests.reference_dust3r import write_checkpoint


@pytest.fixture
def weights(tmp_path: Path) -> str:
    write_checkpoint(tmp_path / "random.pth")
    return str(tmp_path / "random.pth")


def test_choice(weights: str) -> None:
    assert isinstance(make_estimator(), ClassicalEstimator)
    assert isinstance(make_estimator("classical"), ClassicalEstimator)
    for name in ("auto", "dust3r"):
        found = make_estimator(name, weights)
        assert isinstance(found, Dust3rEstimator)
        assert found.network.config["image_size"] == 64


def test_contradictions_are_refused(weights: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown geometry 'magic'"):
        make_estimator("magic")
    with pytest.raises(UserError, match="needs weights"):
        make_estimator("dust3r")
    with pytest.raises(UserError, match="takes no DUSt3R weights"):
        make_estimator("classical", weights)
    with pytest.raises(UserError, match="there are no DUSt3R weights"):
        make_estimator("auto", tmp_path / "none")
    with pytest.raises(UserError, match="holds no DUSt3R network"):
        make_estimator("auto", tmp_path)


def test_half_precision_keeps_the_heads(weights: str) -> None:
    network = Dust3rEstimator(weights, dtype=torch.bfloat16).network
    kinds = {name.split(".")[0]: p.dtype for name, p in network.named_parameters()}
    assert {name for name, dtype in kinds.items() if dtype == torch.float32} == {"head_1", "head_2"}
    image = torch.rand(1, 3, 48, 64)
    maps = network(image, image)
    assert maps[0].points.dtype == maps[1].confidence.dtype == torch.float32


def test_one_photo_through_the_pipeline(weights: str) -> None:
    pipe = FVGenPipeline.from_pretrained("tiny", device="cpu", dust3r_weights=weights)
    photo = ImageSet(torch.rand(1, 3, 50, 80))
    prepared = prepare(photo, None, "orbit:deg=3", 3, (40, 64), estimator=pipe.estimator)
    assert prepared.scene.quality.estimator == "dust3r, estimated cameras"
    assert prepared.photo_frames == (0,)
    assert prepared.segments == (range(0, 3),)
    with pytest.raises(UserError, match="needs at least two"):
        prepare(photo, None, "orbit:deg=3", 3)
