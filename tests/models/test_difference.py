from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fvgen.models.bundle import ModelBundle
from fvgen.models.difference import FILE, save_difference
from fvgen.recipes.presets import get_preset
from fvgen.utils.errors import UserError


def small(seed: int, width: int = 32) -> ModelBundle:
    tiny = get_preset("tiny")
    unet = {**tiny.unet, "model_channels": width, "channel_mult": (1,), "attention_resolutions": (1,)}
    return ModelBundle.random(replace(tiny, unet=unet), seed)


@pytest.fixture
def stored(tmp_path: Path) -> tuple[ModelBundle, ModelBundle, Path]:
    """A base in half precision, a model whose UNet is slightly different, and where the difference lies."""
    small(0).save_pretrained(tmp_path / "base", torch.float16)
    base, model = (ModelBundle.from_pretrained(tmp_path / "base") for _ in range(2))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.unet.parameters():
            p += 1e-3 * torch.randn(p.shape, generator=draw)
        next(model.unet.parameters()).copy_(next(base.unet.parameters()))  # one that did not change
    model.index = replace(model.index, sampler="ddim", steps=50)
    save_difference(model, base, "../base", tmp_path / "model")
    return base, model, tmp_path / "model"


def test_weights_come_back_within_half_a_step(stored: tuple[ModelBundle, ModelBundle, Path]) -> None:
    base, model, path = stored
    found = ModelBundle.from_pretrained(path)
    assert found.index == model.index
    before = base.unet.state_dict()
    for name, value in model.unet.state_dict().items():
        largest = (value - before[name]).abs().max()
        error = (found.unet.state_dict()[name] - value).abs().max()
        assert error <= largest / 254 + 1e-7 * value.abs().max()
    assert torch.equal(next(found.unet.parameters()), next(base.unet.parameters()))
    assert torch.equal(found.prompt, base.prompt)
    assert (path / FILE).stat().st_size < 0.6 * (path.parent / "base/unet/diffusion_pytorch_model.safetensors").stat().st_size


def test_a_saved_copy_needs_no_base(stored: tuple[ModelBundle, ModelBundle, Path], tmp_path: Path) -> None:
    found = ModelBundle.from_pretrained(stored[2])
    found.save_pretrained(tmp_path / "copy")
    shutil.rmtree(tmp_path / "base")
    again = ModelBundle.from_pretrained(tmp_path / "copy")
    for a, b in zip(found.unet.parameters(), again.unet.parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_input(stored: tuple[ModelBundle, ModelBundle, Path], tmp_path: Path) -> None:
    base, model, path = stored
    with pytest.raises(UserError, match="exists"):
        save_difference(model, base, "../base", path)
    with pytest.raises(UserError, match="different shapes"):
        save_difference(small(0, 64), base, "../base", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    other = shutil.copytree(path, tmp_path / "damaged")
    (other / FILE).write_bytes((path / FILE).read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be loaded"):
        ModelBundle.from_pretrained(other)
    index = json.loads((path / "model_index.json").read_text())
    del index["base"]
    (path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not name the model"):
        ModelBundle.from_pretrained(path)
