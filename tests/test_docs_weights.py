"""docs/weights.md, command by command, with random weights in the layout of the originals."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fvgen.cli import main
from fvgen.models.bundle import ModelBundle
from fvgen.recipes.presets import get_preset
from tests.geometry.synthetic import capture, pose
from tests.reference_checkpoints import viewcrafter_state, write_viewcrafter
from tests.reference_dust3r import write_checkpoint

TEXT = (Path(__file__).parent.parent / "docs" / "weights.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.+?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both checkpoints and two photos."""
    root = tmp_path_factory.mktemp("weights")
    write_checkpoint(root / "DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth")
    images, _, _ = capture([pose((x, 0.0, 0.0)) for x in (0.0, 0.2)], (120, 192))
    for name, rgb in zip(("left.jpg", "right.jpg"), images.rgb, strict=True):
        Image.fromarray((rgb.permute(1, 2, 0).numpy() * 255).astype(np.uint8)).save(root / name)
    return root


@pytest.mark.slow
def test_every_command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order; the large preset is a small one here, and the converted model's 50 steps become 2."""
    tiny = get_preset("tiny")
    unet = {**tiny.unet, "model_channels": 32, "channel_mult": (1, 1), "attention_resolutions": (1, 2)}
    vae = {**tiny.vae, "block_out_channels": (16, 16, 16)}
    spec = replace(tiny, index=replace(tiny.index, height=40, width=64), unet=unet, vae=vae)
    write_viewcrafter(place / "model_sparse.ckpt", viewcrafter_state(spec, ModelBundle.random(spec)))
    asked = []
    monkeypatch.setattr("fvgen.recipes.presets.get_preset", lambda name: asked.append(name) or spec)
    monkeypatch.chdir(place)
    outputs = []
    assert len(COMMANDS) == 9
    for line in COMMANDS:
        words = shlex.split(line.replace("--frames 25", "--frames 4"))
        assert words[0] == "fvgen"
        assert main(words[1:]) == 0, (line, capsys.readouterr().err)
        outputs += [words[words.index("--output") + 1]] if "--output" in words else []
        if words[1:3] == ["convert", "viewcrafter"] and "--verify" in words:
            index_file = place / words[words.index("--output") + 1] / "model_index.json"
            index = json.loads(index_file.read_text())
            assert (index["sampler"], index["guidance_scale"], index["steps"]) == ("ddim", 7.5, 50)
            index_file.write_text(json.dumps({**index, "steps": 2}))
    assert asked == ["viewcrafter_1024"]
    assert outputs == [
        "models/dust3r",
        "models/viewcrafter",
        "models/dust3r",
        "models/viewcrafter",
        "look",
        "room",
        "orbit",
        "small",
    ]
    room, small = (json.loads((place / name / "report.json").read_text()) for name in ("room", "small"))
    assert room["geometry"]["estimator"].startswith("dust3r")
    assert (room["arguments"]["sampler"], room["arguments"]["steps"]) == ("teacher", 2)
    assert (place / "orbit" / "video.mp4").is_file()
    assert small["arguments"]["cpu_offload"]


def test_the_python_of_the_page(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments that it names exist."""
    (code,) = re.findall(r"```python\n(.+?)```", TEXT, re.DOTALL)
    code = code.replace('"models/viewcrafter"', '"tiny"').replace("models/dust3r", "DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth")
    monkeypatch.chdir(place)
    names: dict[str, object] = {}
    exec(code.replace("num_frames=25", "num_frames=2"), names)
    assert names["result"].video.rgb.shape == (2, 3, 160, 256)
