"""Sizes, crops and orientations of network images; pairs and their confidence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fvgen.geometry.dust3r.pairs import PairPrediction, complete_pairs, image_confidence, predict_pairs
from fvgen.geometry.dust3r.preprocess import network_image
from fvgen.io.images import read_images
from fvgen.models.dust3r import Dust3rNetwork
from fvgen.utils.errors import UserError


@pytest.mark.parametrize(
    ("photo", "size", "expected"),
    [
        ((1080, 1920), 512, (288, 512)),
        ((1920, 1080), 512, (512, 288)),
        ((3000, 4000), 512, (384, 512)),
        ((427, 640), 512, (336, 512)),
        ((700, 700), 512, (384, 512)),
        ((384, 512), 512, (384, 512)),
        ((90, 160), 512, (288, 512)),
        ((300, 200), 224, (224, 224)),
    ],
)
def test_size(photo: tuple[int, int], size: int, expected: tuple[int, int]) -> None:
    assert network_image(torch.zeros(3, *photo), size).pixels.shape[-2:] == expected


def test_an_image_of_the_right_size_is_left_alone() -> None:
    rgb = torch.randint(0, 256, (3, 96, 128)).float() / 255
    torch.testing.assert_close(network_image(rgb, 128).rgb, rgb, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("photo", [(141, 250), (250, 141), (150, 150), (50, 70)])
def test_pixels_are_found_again(photo: tuple[int, int]) -> None:
    """Resampling keeps a linear ramp, so that each network pixel shows the coordinate it was taken from."""
    height, width = photo
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    result = network_image(torch.stack([x / width, y / height, torch.zeros(photo)]), 128)
    rows, columns = result.pixels.shape[-2:]
    v, u = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    network_xy = torch.stack([u, v, torch.ones(rows, columns)], dim=-1).double()
    photo_xy = (network_xy @ torch.linalg.inv(result.network_from_photo).T)[..., :2]
    shown = result.rgb[:2].permute(1, 2, 0).double() * torch.tensor([width, height])
    inner = (slice(8, -8), slice(8, -8))
    bound = max(photo) / 255  # one step of 8 bit
    assert (shown[inner] - photo_xy[inner]).abs().max() < bound
    assert (shown[inner] - photo_xy[inner]).mean(dim=(0, 1)).abs().max() < 0.1


def test_exif_orientation_comes_first(tmp_path) -> None:
    upright = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned; shown after a quarter turn clockwise
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "upright.png")
    turned, plain = (network_image(read_images([tmp_path / f"{n}.png"]).rgb[0], 128).pixels for n in ("turned", "upright"))
    assert plain.shape[-2:] == (128, 80)
    assert torch.equal(turned, plain)


def test_a_strip_is_refused() -> None:
    with pytest.raises(UserError, match="2000x20 pixels is too long and narrow"):
        network_image(torch.zeros(3, 20, 2000))


def test_order_of_pairs() -> None:
    assert complete_pairs(3) == [(1, 0), (2, 0), (2, 1), (0, 1), (0, 2), (1, 2)]


def test_confidence_is_the_highest_of_all_pairs() -> None:
    points, low, high = torch.zeros(1, 2, 3), torch.tensor([[2.0, 5.0]]), torch.tensor([[3.0, 4.0]])
    predictions = [PairPrediction(0, 1, points, low, points, 10 * low), PairPrediction(1, 0, points, 0 * high, points, high)]
    assert image_confidence(predictions, 0).tolist() == [[3.0, 5.0]]
    assert image_confidence(predictions, 1).tolist() == [[20.0, 50.0]]
    assert predictions[0].score == pytest.approx(3.5 * 35.0)


def test_each_image_is_encoded_once() -> None:
    torch.manual_seed(0)
    small = {"encoder_width": 16, "encoder_layers": 1, "encoder_heads": 2, "decoder_width": 8, "decoder_layers": 4}
    small |= {"decoder_heads": 1, "layer_widths": (4, 4, 4, 4), "feature_width": 8, "last_width": 4}
    network = Dust3rNetwork(**small).eval()
    calls, fractions = [], []
    network.patch_embedding.register_forward_hook(lambda _m, inputs, _o: calls.append(inputs[0].shape))
    images = [torch.rand(1, 3, 32, 48), torch.rand(1, 3, 48, 32), torch.rand(1, 3, 32, 32)]
    found = predict_pairs(network, images, complete_pairs(3), progress=lambda _text, f: fractions.append(f))
    assert len(calls) == 3
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    with torch.no_grad():
        for prediction, (first, second) in zip(found, complete_pairs(3), strict=True):
            expected = network(images[first], images[second])
            torch.testing.assert_close(prediction.points_first, expected[0].points[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(prediction.confidence_second, expected[1].confidence[0], rtol=1e-5, atol=1e-6)


SMALL = {"encoder_width": 16, "encoder_layers": 1, "encoder_heads": 2, "decoder_width": 8, "decoder_layers": 4}
SMALL |= {"decoder_heads": 1, "layer_widths": (4, 4, 4, 4), "feature_width": 8, "last_width": 4}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_change_nothing(device: str) -> None:
    """Three photos of one size and one upright, in batches of three, against one at a time on the CPU."""
    torch.manual_seed(0)
    network = Dust3rNetwork(**SMALL).eval()
    images = [torch.rand(1, 3, *size) * 2 - 1 for size in ((32, 48), (32, 48), (48, 32), (32, 48))]
    expected = predict_pairs(network, images, complete_pairs(4), batch=1)
    found = predict_pairs(network.to(device), images, complete_pairs(4), batch=3)
    assert [(p.first, p.second) for p in found] == complete_pairs(4)
    bound = 1e-5 if device == "cpu" else 5e-3  # TF32 has 10 bits
    for one, other in zip(found, expected, strict=True):
        for name in ("points_first", "confidence_first", "points_second", "confidence_second"):
            torch.testing.assert_close(getattr(one, name).cpu(), getattr(other, name), rtol=bound, atol=bound)
