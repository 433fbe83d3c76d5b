from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from fvgen.io import read_images
from fvgen.utils.errors import UserError


def picture(height: int = 40, width: int = 60) -> Image.Image:
    v, u = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([u * 4, v * 6, (u + v) * 2], axis=-1).astype(np.uint8))


def save(
    path: Path, image: Image.Image, tags: dict[int, object] | None = None, exif_tags: dict[int, object] | None = None
) -> str:
    exif = Image.Exif()
    exif.update(tags or {})
    exif.get_ifd(ExifTags.IFD.Exif).update(exif_tags or {})
    image.save(path, exif=exif)
    return str(path)


def test_pixels_and_names(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{i}.png", picture()) for i in range(2)]
    images = read_images(paths)
    assert images.rgb.shape == (2, 3, 40, 60)
    assert images.rgb.dtype == torch.float32
    assert images.names == tuple(paths)
    assert images.focal_px == (None, None)
    want = torch.from_numpy(np.asarray(picture()).copy()).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(images.rgb[1], want)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, orientation: int) -> None:
    upright = np.asarray(picture())
    # How the sensor stored the upright photo, per EXIF 2.3 table of Orientation.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    path = save(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(stored)), {0x0112: orientation})
    got = (read_images([path]).rgb[0].permute(1, 2, 0) * 255).round().byte().numpy()
    np.testing.assert_array_equal(got, upright)


def test_focal_from_35mm_equivalent_is_defined_on_the_diagonal(tmp_path: Path) -> None:
    path = save(tmp_path / "a.jpg", picture(240, 320), exif_tags={ExifTags.Base.FocalLengthIn35mmFilm: 26})
    assert read_images([path]).focal_px[0] == pytest.approx(26 * 400 / np.hypot(36, 24))
    half = read_images([path], max_side=160)
    assert half.rgb.shape[2:] == (120, 160)
    assert half.focal_px[0] == pytest.approx(13 * 400 / np.hypot(36, 24))


def test_focal_from_sensor_resolution(tmp_path: Path) -> None:
    tags = {
        ExifTags.Base.FocalLength: 5.0,
        ExifTags.Base.FocalPlaneXResolution: 160.0,  # pixels per millimetre of the photo as taken, 640 wide
        ExifTags.Base.FocalPlaneResolutionUnit: 4,
        ExifTags.Base.ExifImageWidth: 640,
    }
    path = save(tmp_path / "a.jpg", picture(240, 320), exif_tags=tags)
    assert read_images([path]).focal_px[0] == pytest.approx(400.0)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_other_pixel_formats(tmp_path: Path, mode: str) -> None:
    grey = np.full((20, 30), 128, np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / "a.png")
    assert read_images([tmp_path / "a.png"]).rgb.mean().item() == pytest.approx(128 / 255, abs=2e-3)


def test_bad_files_name_the_file_in_one_sentence(tmp_path: Path) -> None:
    good = save(tmp_path / "good.jpg", picture(200, 300))
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(Path(good).read_bytes()[:1500])
    picture(15, 60).save(tmp_path / "small.png")
    picture(60, 40).save(tmp_path / "portrait.png")
    picture(40, 60).save(tmp_path / "landscape.png")
    Image.new("1", (20000, 15000)).save(tmp_path / "big.png")
    for name, word in {
        "missing.jpg": "does not exist",
        "text.jpg": "not an image",
        "empty.jpg": "not an image",
        "cut.jpg": "cut short",
        "small.png": "only 60x15",
        "big.png": "too many pixels",
    }.items():
        with pytest.raises(UserError, match=word) as caught:
            read_images([tmp_path / name])
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="differ in size"):
        read_images([tmp_path / "landscape.png", tmp_path / "portrait.png"])
    with pytest.raises(UserError, match="folder"):
        read_images([tmp_path])
    with pytest.raises(UserError, match="no photos"):
        read_images([])
