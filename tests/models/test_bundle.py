from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fvgen.diffusion.convert import convert_checkpoint
from fvgen.models.bundle import ModelBundle, build_component, read_index
from fvgen.models.checkpoint import read_reference_checkpoint
from fvgen.models.clip import ClipTextTower
from fvgen.models.key_map import KEY_MAPS, PREFIXES, ignored_reason
from fvgen.models.spec import COMPONENTS, ModelSpec
from fvgen.recipes.presets import PRESETS, get_preset
from fvgen.utils.errors import UserError
from tests.reference_checkpoints import LAYOUTS, viewcrafter_spec, viewcrafter_state, write_viewcrafter


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return viewcrafter_spec("tiny")


@pytest.fixture(scope="module")
def bundle(spec: ModelSpec) -> ModelBundle:
    return ModelBundle.random(spec, seed=0)


def _states(bundle: ModelBundle) -> dict[str, torch.Tensor]:
    states = {f"{n}.{k}": v for n in COMPONENTS for k, v in getattr(bundle, n).state_dict().items()}
    return states | {"prompt": bundle.prompt, "empty": bundle.empty}


def test_seed(spec: ModelSpec, bundle: ModelBundle) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    again, other = ModelBundle.random(spec, seed=0), ModelBundle.random(spec, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(_states(bundle).values(), _states(again).values(), strict=True))
    assert not torch.equal(bundle.unet.conv_in.weight, other.unet.conv_in.weight)


def test_round_trip(bundle: ModelBundle, tmp_path: Path) -> None:
    bundle.save_pretrained(tmp_path / "model")
    loaded = ModelBundle.from_pretrained(tmp_path / "model")
    assert loaded.index == bundle.index
    expected, actual = _states(bundle), _states(loaded)
    assert set(expected) == set(actual)
    assert all(torch.equal(actual[k], expected[k]) for k in expected)
    assert not loaded.unet.training
    assert loaded.unet.config.channel_mult is not None
    context = torch.cat([loaded.prompt[None], torch.randn(1, 32, 64)], dim=1)
    x = torch.randn(1, 16, 2, 4, 4)
    assert torch.equal(loaded.unet(x, torch.tensor([9]), context), bundle.unet(x, torch.tensor([9]), context))


def test_an_empty_directory_is_taken(bundle: ModelBundle, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    bundle.save_pretrained(tmp_path / "model")
    assert read_index(tmp_path / "model") == bundle.index
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_half_precision_file_and_replacement(bundle: ModelBundle, tmp_path: Path) -> None:
    bundle.save_pretrained(tmp_path / "model")
    bundle.save_pretrained(tmp_path / "model", dtype=torch.float16)
    assert bundle.unet.dtype == torch.float32
    loaded = ModelBundle.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert loaded.unet.dtype == loaded.prompt.dtype == torch.bfloat16
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_write_leaves_the_old_model(bundle: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.save_pretrained(tmp_path / "model")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("fvgen.models.tensor_files.stored", full)
    for place in (tmp_path / "model", tmp_path / "new" / "deep" / "model"):
        with pytest.raises(UserError, match="the disk is full"):
            bundle.save_pretrained(place)
    ModelBundle.from_pretrained(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("part", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "prompt.safetensors"])
def test_missing_part(bundle: ModelBundle, tmp_path: Path, part: str) -> None:
    bundle.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / part).unlink()
    with pytest.raises(UserError, match=part):
        ModelBundle.from_pretrained(tmp_path / "model")


def test_wrong_weights_and_kinds(bundle: ModelBundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model_index\.json"):
        read_index(tmp_path)
    root = tmp_path / "model"
    bundle.save_pretrained(root)
    save_file({"a": torch.zeros(1)}, root / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="the unet in"):
        ModelBundle.from_pretrained(root)
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="StableDiffusionPipeline"):
        ModelBundle.from_pretrained(root)
    (root / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_index(root)
    (root / "model_index.json").write_text(json.dumps({"kind": "fvgen"}))
    with pytest.raises(UserError, match="lacks preset"):
        read_index(root)
    (root / "model_index.json").write_text(json.dumps({"kind": "fvgen", **bundle.index.to_dict(), "height": "tall"}))
    with pytest.raises(UserError, match="has 'tall' for height"):
        read_index(root)
    (root / "model_index.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid JSON"):
        read_index(root)


def test_other_directories_are_not_overwritten(bundle: ModelBundle, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_text("x")
    with pytest.raises(UserError, match="will not be overwritten"):
        bundle.save_pretrained(tmp_path)
    assert (tmp_path / "photo.jpg").exists()


@pytest.mark.parametrize("layout", [*LAYOUTS, "safetensors"])
def test_checkpoint_conversion(spec: ModelSpec, bundle: ModelBundle, tmp_path: Path, layout: str) -> None:
    state = viewcrafter_state(spec, bundle)
    path = tmp_path / ("model.safetensors" if layout == "safetensors" else "model.ckpt")
    if layout == "safetensors":
        save_file(state, path)
    else:
        write_viewcrafter(path, state, layout)
    assert set(read_reference_checkpoint(path)) == set(state)
    converted = convert_checkpoint(path, spec)
    assert (converted.index.sampler, converted.index.steps, converted.index.guidance_scale) == ("ddim", 50, 7.5)
    for name in COMPONENTS:
        ours, theirs = getattr(bundle, name).state_dict(), getattr(converted, name).state_dict()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert converted.prompt.shape == (77, 64)
    assert not torch.equal(converted.prompt, converted.empty)


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_weight_has_one_reference_name(preset: str) -> None:
    spec = get_preset(preset)
    with torch.device("meta"):
        modules = {name: build_component(name, getattr(spec, name)) for name in COMPONENTS}
        modules["text_encoder"] = ClipTextTower(**spec.text_encoder)
    blocks, names = len(modules["text_encoder"].blocks), []
    for name, module in modules.items():
        key_map = KEY_MAPS[name](module)
        assert set(key_map) == set(module.state_dict())
        names += [PREFIXES[name] + theirs for theirs in key_map.values()]
    assert len(names) == len(set(names))
    assert not [n for n in names if ignored_reason(n, blocks)]


def test_tiny_fits_in_twelve_megabytes() -> None:
    spec = get_preset("tiny")
    with torch.device("meta"):
        total = sum(sum(p.numel() for p in build_component(n, getattr(spec, n)).parameters()) for n in COMPONENTS)
    assert total <= 6_000_000 - 2 * 77 * 64


def test_unknown_preset() -> None:
    with pytest.raises(UserError, match="viewcrafter_512"):
        get_preset("huge")


def test_sizes() -> None:
    assert get_preset("tiny").index.sizes() == [(160, 256), (256, 160)]
    assert get_preset("viewcrafter_512").index.sizes() == [(320, 512)]
