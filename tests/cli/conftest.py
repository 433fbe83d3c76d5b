"""Small photos with cameras, and a model small enough to run within a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fvgen.cli import main
from fvgen.io import write_transforms
from fvgen.models.bundle import ModelBundle
from fvgen.recipes.presets import get_preset
from tests.geometry.synthetic import capture, pose
from tests.reference_dust3r import write_checkpoint


@dataclass(frozen=True)
class Photos:
    """``photos``: three photos from a row of five places; ``all``: all five; ``cameras``: transforms.json of all five."""

    photos: list[str]
    all: list[str]
    cameras: str


@pytest.fixture(scope="session")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    root = tmp_path_factory.mktemp("scene")
    places = [pose((0.12 * i - 0.24, 0.0, 0.0), (0.0, -1.5 * i, 0.0)) for i in range(5)]
    images, cameras, _ = capture(places, (120, 192))
    files = [f"images/{i:04d}.png" for i in range(5)]
    (root / "images").mkdir()
    for name, rgb in zip(files, images.rgb, strict=True):
        Image.fromarray((rgb.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(root / name)
    write_transforms(root / "transforms.json", cameras, files)
    paths = [str(root / name) for name in files]
    return Photos(paths[::2], paths, str(root / "transforms.json"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tiny = get_preset("tiny")
    index = replace(tiny.index, height=40, width=64)
    unet = {**tiny.unet, "model_channels": 32, "channel_mult": (1, 1), "attention_resolutions": (1, 2)}
    vae = {**tiny.vae, "block_out_channels": (16, 16, 16)}
    directory = tmp_path_factory.mktemp("models") / "small"
    ModelBundle.random(replace(tiny, index=index, unet=unet, vae=vae)).save_pretrained(directory, dtype=torch.float16)
    return str(directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small random DUSt3R, in the reference layout."""
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def converted(checkpoint: Path) -> Path:
    """The directory that ``fvgen convert dust3r`` makes of it."""
    folder = checkpoint.parent / "dust3r"
    assert main(["convert", "dust3r", str(checkpoint), "--output", str(folder)]) == 0
    return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fvgen(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line; returns exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def report() -> Callable[[Path], dict]:
    return lambda directory: json.loads((directory / "report.json").read_text())
