"""The network of DUSt3R against closed forms, and what its checkpoint reader accepts."""

from __future__ import annotations

import argparse
import math
import pickle

import pytest
import torch

from fvgen.models.dust3r import Dust3rNetwork, load_dust3r, read_dust3r_checkpoint
from fvgen.models.dust3r.checkpoint import network_arguments
from fvgen.models.dust3r.head import point_map
from fvgen.models.dust3r.layers import grid_positions, rotary, rotate
from fvgen.utils.errors import UserError

SMALL = {"encoder_width": 16, "encoder_layers": 1, "encoder_heads": 2, "decoder_width": 8, "decoder_layers": 4}
SMALL |= {"decoder_heads": 1, "layer_widths": (4, 4, 4, 4), "feature_width": 8, "last_width": 4}


def test_positions_run_row_by_row() -> None:
    assert grid_positions((2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_rotation_is_a_complex_product() -> None:
    """Each pair of channels (i, i + D) is one complex number, turned by y in the first half of a head and by x in the second."""
    width, quarter = 12, 3
    x, positions = torch.randn(1, 2, 4, width), torch.tensor([[[0, 5], [7, 0], [3, 2], [1, 1]]])
    turned = rotate(x, rotary(positions, width)).double()
    for half in (0, 1):
        for i in range(quarter):
            a, b = half * 2 * quarter + i, half * 2 * quarter + i + quarter
            angle = positions[0, :, half].double() * 100.0 ** (-2 * i / (2 * quarter))
            expected = torch.complex(x[..., a].double(), x[..., b].double()) * torch.polar(torch.ones_like(angle), angle)
            torch.testing.assert_close(turned[..., a], expected.real, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(turned[..., b], expected.imag, rtol=1e-5, atol=1e-5)


def test_rotated_products_depend_on_the_difference_of_positions() -> None:
    q, k, positions = torch.randn(1, 1, 6, 16), torch.randn(1, 1, 6, 16), grid_positions((2, 3))[None]

    def scores(shift: int) -> torch.Tensor:
        angles = rotary(positions + shift, 16)
        return rotate(q, angles) @ rotate(k, angles).transpose(-1, -2)

    torch.testing.assert_close(scores(0), scores(11), rtol=1e-4, atol=1e-4)


def test_point_map_is_exponential_in_the_distance() -> None:
    raw = torch.tensor([[3e-6, 4e-6, 0.0, 0.0], [0.6, 0.0, 0.8, 2.0], [0.0, 0.0, 0.0, -30.0]]).T[None, :, None]
    result = point_map(raw)
    # expm1: at a distance of 5e-6, exp(d) - 1 in float32 would be wrong in the second digit
    expected = torch.tensor([[3e-6, 4e-6, 0.0], [0.6 * math.expm1(1), 0.0, 0.8 * math.expm1(1)], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(result.points[0, 0], expected, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(result.confidence[0, 0], torch.tensor([2.0, 1 + math.exp(2), 1.0]))


def test_a_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="40x32 pixels does not divide into patches of 16"):
        Dust3rNetwork(**SMALL).encode(torch.zeros(1, 3, 32, 40))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"encoder_heads": 8}, "width of 16 does not divide into 8 heads"),
        ({"encoder_heads": 3}, "width of 16 does not divide into 3 heads"),
        ({"encoder_heads": 0}, "encoder_heads=0"),
        ({"decoder_heads": 4}, "width of 8 does not divide into 4 heads"),
        ({"encoder_width": -16}, "encoder_width=-16"),
        ({"decoder_layers": 0}, "decoder_layers=0"),
        ({"decoder_layers": 2.5}, "decoder_layers=2.5"),
        ({"patch_size": 8}, "patch_size=8"),
        ({"rope_base": 0.0}, "rope_base=0.0"),
        ({"rope_base": math.nan}, "rope_base=nan"),
        ({"mlp_ratio": 0.01}, "mlp_ratio=0.01"),
        ({"layer_widths": (4, 4, 4)}, "layer_widths"),
        ({"last_width": 0}, "last_width=0"),
        ({"feature_width": 1}, "feature_width=1"),
        ({"image_size": 8}, "image_size=8"),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        Dust3rNetwork(**{**SMALL, **sizes})
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_features_serve_several_pairs() -> None:
    torch.manual_seed(0)
    network = Dust3rNetwork(**SMALL).eval()
    a, b = torch.rand(1, 3, 32, 48), torch.rand(1, 3, 48, 32)
    encoded = network.encode(a), network.encode(b)
    for first, second, images in ((0, 1, (a, b)), (1, 0, (b, a))):
        for actual, expected in zip(network.decode(encoded[first], encoded[second]), network(*images), strict=True):
            torch.testing.assert_close(actual.points, expected.points, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_transposed_images_equal_upright_ones() -> None:
    torch.manual_seed(0)
    network = Dust3rNetwork(**SMALL).eval()
    a, b = torch.rand(1, 3, 64, 32), torch.rand(1, 3, 32, 64)
    upright = network(a, b)
    flags = torch.tensor([True]), torch.tensor([False])
    stored = network(a.transpose(2, 3), b, *flags)
    torch.testing.assert_close(stored[0].points.transpose(1, 2), upright[0].points, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stored[1].points, upright[1].points, rtol=1e-4, atol=1e-6)


def test_constructor_text_is_read_and_never_run() -> None:
    text = (
        "AsymmetricCroCo3DStereo(pos_embed='RoPE100', patch_embed_cls='ManyAR_PatchEmbed', img_size=(512, 512), head_type='dpt', "
        "output_mode='pts3d', depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf), enc_embed_dim=1024, enc_depth=24, "
        "enc_num_heads=16, dec_embed_dim=768, dec_depth=12, dec_num_heads=12, landscape_only=False)"
    )
    sizes = {"encoder_width": 1024, "encoder_layers": 24, "encoder_heads": 16}
    sizes |= {"decoder_width": 768, "decoder_layers": 12, "decoder_heads": 12}
    assert network_arguments(text) == {"rope_base": 100.0, "image_size": 512} | sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('true')", "only AsymmetricCroCo3DStereo"),
        ("AsymmetricCroCo3DStereo(enc_depth=open('x'))", "only AsymmetricCroCo3DStereo"),
        ("AsymmetricCroCo3DStereo(24)", "only AsymmetricCroCo3DStereo"),
        ("not python (", "only AsymmetricCroCo3DStereo"),
        ("AsymmetricMASt3R(enc_depth=24)", "only AsymmetricCroCo3DStereo"),
        ("AsymmetricCroCo3DStereo(head_type='linear')", "head_type='linear' is not supported"),
        ("AsymmetricCroCo3DStereo(conf_mode=('sigmoid', 0, 1))", "conf_mode"),
        ("AsymmetricCroCo3DStereo(pos_embed='cosine')", "pos_embed"),
        ("AsymmetricCroCo3DStereo(new=1)", "new=1 is not supported"),
        ("AsymmetricCroCo3DStereo(img_size='large')", "img_size='large' is not supported"),
    ],
)
def test_other_models_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        network_arguments(text)


def test_a_namespace_in_the_file_is_read_without_running_code(tmp_path) -> None:
    torch.save({"args": argparse.Namespace(model="Some(text)", lr=1e-4), "model": {"w": torch.ones(2)}}, tmp_path / "ok.pth")
    state, text = read_dust3r_checkpoint(tmp_path / "ok.pth")
    assert text == "Some(text)"
    assert torch.equal(state["w"], torch.ones(2))


class _Harmful:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_bad_files_are_refused_in_one_sentence(tmp_path) -> None:
    trace = tmp_path / "ran"
    torch.save({"args": _Harmful(str(trace)), "model": {}}, tmp_path / "harmful.pth")
    (tmp_path / "garbage.pth").write_bytes(b"\x00garbage")
    (tmp_path / "garbage.safetensors").write_bytes(b"\x00garbage")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps([1, 2]))
    torch.save({"weights": {}}, tmp_path / "other.pth")
    for name in ("harmful.pth", "garbage.pth", "garbage.safetensors", "plain.pth", "other.pth", "absent.pth"):
        with pytest.raises(UserError) as error:
            load_dust3r(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    assert not trace.exists()
