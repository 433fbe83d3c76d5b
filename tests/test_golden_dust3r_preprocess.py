"""What DUSt3R and ViewCrafter make of photos before the network sees them, and symmetric pairs, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fvgen.geometry.dust3r.pairs import predict_pairs
from fvgen.geometry.dust3r.preprocess import network_image, viewcrafter_frame
from tests import golden_dust3r as reference

pytestmark = pytest.mark.golden
DUST3R, VIEWCRAFTER = "preprocess_dust3r", "preprocess_viewcrafter"


def _load(file: str, case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    entry = reference.manifest(f"manifest_{file}")[case]
    return entry, reference.tensors(file, f"{case}.")


def _photo(values: dict[str, Tensor]) -> Tensor:
    return values["input_u8"].permute(2, 0, 1).float() / 255


def _bytes(rgb: Tensor) -> Tensor:
    return (rgb * 255).round().to(torch.uint8).permute(1, 2, 0)


@pytest.mark.parametrize("case", reference.cases(f"manifest_{DUST3R}"))
def test_network_image(case: str) -> None:
    entry, values = _load(DUST3R, case)
    result = network_image(_photo(values), entry["long_side"], square=case.endswith("_ok"))
    assert list(result.pixels.shape) == [1, 3, *entry["output_HW"]]
    assert entry["true_shape"] == [list(result.pixels.shape[-2:])]
    assert torch.equal(_bytes(result.rgb), values["output_u8"])
    # the reference's own order of operations: (x / 255 - 0.5) / 0.5
    expected = (values["output_u8"].permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(result.pixels, expected, rtol=0.0, atol=2e-7)


@pytest.mark.parametrize("case", reference.cases(f"manifest_{VIEWCRAFTER}"))
def test_viewcrafter_frame(case: str) -> None:
    entry, values = _load(VIEWCRAFTER, case)
    frame = viewcrafter_frame(_photo(values))
    assert frame.shape == (3, 576, 1024)
    assert torch.equal(_bytes(frame)[::4], values["cropped_1024x576_u8_every4th_row"])
    result = network_image(frame, entry["long_side"])
    assert list(result.pixels.shape[-2:]) == entry["output_HW"]
    assert torch.equal(_bytes(result.rgb), values["output_u8"])


def test_both_orders_of_a_pair() -> None:
    values = reference.tensors("tiny_symmetrised")
    assert torch.equal(values["img1"], values["img2"].flip(0))
    images = list(values["img1"].split(1))
    for row, found in enumerate(predict_pairs(reference.tiny_network(), images, [(0, 1), (1, 0)])):
        reference.assert_points_close(found.points_first, values["pts3d"][row])
        reference.assert_points_close(found.points_second, values["pts3d_in_other_view"][row])
        torch.testing.assert_close(found.confidence_first, values["conf1"][row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.confidence_second, values["conf2"][row], rtol=1e-4, atol=1e-5)
