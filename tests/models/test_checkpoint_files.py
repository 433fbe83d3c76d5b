"""What the readers of both kinds of checkpoints refuse, and in which words."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fvgen.diffusion.convert import convert_checkpoint
from fvgen.diffusion.schedule import check_buffers
from fvgen.models.checkpoint import convert_reference, read_reference_checkpoint
from fvgen.models.dust3r import convert_dust3r, load_dust3r, read_dust3r, read_dust3r_checkpoint
from fvgen.models.dust3r.checkpoint import network_arguments
from fvgen.models.key_map import SCHEDULE_BUFFERS
from fvgen.models.weights_file import checked_sha256
from fvgen.utils.errors import UserError
from tests.reference_checkpoints import (
    dust3r_arguments,
    dust3r_state,
    viewcrafter_spec,
    viewcrafter_state,
    write_dust3r,
    write_viewcrafter,
)

READERS: dict[str, Callable[[Path], Any]] = {"viewcrafter": read_reference_checkpoint, "dust3r": read_dust3r_checkpoint}
both = pytest.mark.parametrize("kind", READERS)


class Harmful:
    """Would open a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


class Custom:
    """Of a module that is not allowed."""


def refused(read: Callable[[Path], Any], path: Path) -> str:
    """The message, which is one sentence that names the file."""
    with pytest.raises(UserError) as error:
        read(path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@both
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_what_downloads_leave(tmp_path: Path, kind: str, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(b"")
    assert "is empty; download it again" in refused(READERS[kind], path)
    path.write_bytes(b"\n<!DOCTYPE html><html><body>404</body></html>")
    assert "is a web page, not a checkpoint; download" in refused(READERS[kind], path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "Git LFS" in refused(READERS[kind], path)
    path.write_bytes(b"\x00garbage")
    assert "download it again" in refused(READERS[kind], path)
    assert "check the path" in refused(READERS[kind], tmp_path / "absent.ckpt")


@both
def test_cut_short(tmp_path: Path, kind: str) -> None:
    torch.save({"state_dict": {"w": torch.ones(1000)}}, tmp_path / "file.ckpt")
    save_file({"w": torch.ones(1000)}, tmp_path / "file.safetensors")
    torch.save({"state_dict": {"w": torch.ones(1000)}}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    for name in ("file.ckpt", "file.safetensors", "old.ckpt"):
        path, words = tmp_path / name, "cut short" if name == "file.ckpt" else "download it again"
        data = path.read_bytes()
        for length in (len(data) // 2, len(data) - 10, 20):
            path.write_bytes(data[:length])
            assert words in refused(READERS[kind], path), (name, length)


@both
def test_objects_are_named_and_not_made(tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "ran"
    for zipped in (True, False):
        path = tmp_path / f"harmful{zipped}.ckpt"
        for thing, name in ((Harmful(str(trace)), "open"), (Custom(), f"{__name__}.Custom")):
            torch.save({"state_dict": {"w": torch.ones(1)}, "args": thing}, path, _use_new_zipfile_serialization=zipped)
            message = refused(READERS[kind], path)
            assert name in message
            assert "could run code" in message
    assert not trace.exists()


@both
def test_contents_that_are_no_weights(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.ckpt"
    contents: dict[str, Any] = {
        "holds a list": [1, 2],
        "holds a Tensor": torch.ones(2),
        "holds no weights": {"state_dict": {}},
        "'a' under 'model', which is a int and no tensor": {"model": {"a": 1}},
        "'w' at its top, which is a dict and no tensor, and none of state_dict": {"w": {}},
        "the name 3 under 'module', which is no text": {"module": {3: torch.ones(1)}},
        "int64": {"state_dict": {"a": torch.ones(1, dtype=torch.int64)}},
        "sparse": {"state_dict": {"a": torch.ones(2, 2).to_sparse()}},
    }
    for words, content in contents.items():
        torch.save(content, path)
        assert words in refused(READERS[kind], path), words
    path.write_bytes(pickle.dumps([1, 2]))
    refused(READERS[kind], path)


def test_the_other_kind(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    for layout in ("state_dict", "module"):
        write_viewcrafter(path, {"model.diffusion_model.out.2.bias": torch.ones(1)}, layout)
        assert "is a checkpoint of ViewCrafter; use `fvgen convert viewcrafter" in refused(read_dust3r_checkpoint, path)
    torch.save({"args": argparse.Namespace(model=""), "model": {"enc_blocks.0.norm1.weight": torch.ones(1)}}, path)
    assert "is a checkpoint of DUSt3R; use `fvgen convert dust3r" in refused(read_reference_checkpoint, path)


def test_deepspeed_names_lose_sixteen_characters_and_others_are_renamed(tmp_path: Path) -> None:
    one = torch.ones(1)
    torch.save({"module": {"any_sixteen_char.framestride_embed.w": one}}, tmp_path / "a.ckpt")
    assert list(read_reference_checkpoint(tmp_path / "a.ckpt")) == [".framestride_embed.w"]
    torch.save({"state_dict": {"_forward_module.framestride_embed.w": one}}, tmp_path / "b.ckpt")
    assert list(read_reference_checkpoint(tmp_path / "b.ckpt")) == ["_forward_module.fps_embedding.w"]
    torch.save({"state_dict": {"framestride_embed.w": one, "fps_embedding.w": one}}, tmp_path / "c.ckpt")
    assert "two weights for 'fps_embedding.w'" in refused(read_reference_checkpoint, tmp_path / "c.ckpt")


def test_viewcrafter_keys_are_exact() -> None:
    spec = viewcrafter_spec("tiny")
    state, bias = viewcrafter_state(spec), "model.diffusion_model.out.2.bias"

    def message(changed: dict[str, torch.Tensor]) -> str:
        with pytest.raises(UserError) as error:
            convert_reference(changed, spec)
        return str(error.value)

    assert f"1 missing ({bias})" in message({k: v for k, v in state.items() if k != bias})
    unet = [k for k in state if k.startswith("model.diffusion_model.")]
    lacking = message({k: v for k, v in state.items() if k not in unet})
    assert f"{len(unet)} missing ({', '.join(unet[:3])}, ...)" in lacking
    for name in (
        "extra.weight",
        "extra",
        "model_ema.decay",
        "embedder.model.visual.ln_post.extra",
        "cond_stage_model.model.extra",
    ):
        assert f"1 not known ({name})" in message(state | {name: torch.zeros(1)})
    for name in (
        "cond_stage_model.model.transformer.resblocks.7.ln_1.weight",
        "cond_stage_model.model.transformer.resblocks.x.a",
    ):
        assert f"1 not known ({name})" in message(state | {name: torch.zeros(64)})
    ignored = ["embedder.model.visual.proj", "cond_stage_model.model.logit_scale", "embedder.model.ln_final.bias"]
    ignored += ["cond_stage_model.model.transformer.resblocks.2.ln_1.weight", *SCHEDULE_BUFFERS]
    for name in (bias, *ignored):
        assert f"1 of another shape ({name} has 3 x 5 instead of" in message(state | {name: torch.zeros(3, 5)})
        assert f"1 missing ({name})" in message({k: v for k, v in state.items() if k != name})
    both_ways = message({**{k: v for k, v in state.items() if k != bias}, "a": torch.zeros(1)})
    assert "1 missing" in both_ways
    assert "1 not known" in both_ways
    with pytest.raises(UserError, match="differs in scale_arr"):
        check_buffers(state, 0.3)


def test_half_precision_stays(tmp_path: Path) -> None:
    spec = viewcrafter_spec("tiny")
    write_viewcrafter(tmp_path / "half.ckpt", viewcrafter_state(spec, None, torch.float16))
    bundle = convert_checkpoint(tmp_path / "half.ckpt", spec)
    assert bundle.unet.dtype == torch.float16
    assert bundle.prompt.dtype == torch.float32
    assert torch.isfinite(bundle.prompt).all()


def test_dust3r_keys_are_exact() -> None:
    state, arguments = dust3r_state("tiny"), dust3r_arguments("tiny")
    convert_dust3r(state, **arguments)

    def message(changed: dict[str, torch.Tensor]) -> str:
        with pytest.raises(UserError) as error:
            convert_dust3r(changed, **arguments)
        return str(error.value)

    name, unused = "enc_norm.weight", "downstream_head1.dpt.scratch.refinenet4.resConfUnit1.conv1.bias"
    assert f"1 missing ({name})" in message({k: v for k, v in state.items() if k != name})
    assert "1 not known (prediction_head.weight)" in message(state | {"prediction_head.weight": torch.zeros(1)})
    unknown = unused.replace("conv1.bias", "conv3.bias")
    assert f"1 not known ({unknown})" in message(state | {unknown: torch.zeros(1)})
    for key in (name, unused, "mask_token"):
        assert f"1 of another shape ({key} has 3 x 5" in message(state | {key: torch.zeros(3, 5)})
    first = "downstream_head1.dpt.scratch.layer1_rn.weight"
    second = "downstream_head1.dpt.scratch.layer_rn.0.weight"
    assert f"{first} and {second} differ" in message(state | {second: state[first] + 1})
    for left_out in (first, second, "mask_token", unused):
        convert_dust3r({k: v for k, v in state.items() if k != left_out}, **arguments)
    lacking = {k: v for k, v in state.items() if k not in (first, second)}
    assert f"({first}" in message(lacking)


@pytest.mark.parametrize(
    "text",
    [
        5,
        None,
        b"AsymmetricCroCo3DStereo()",
        "AsymmetricCroCo3DStereo(",
        "AsymmetricCroCo3DStereo(" + "(" * 5000,
        "AsymmetricCroCo3DStereo(enc_depth='many')",
        "AsymmetricCroCo3DStereo(enc_depth=-1)",
        "AsymmetricCroCo3DStereo(enc_depth=True)",
        "AsymmetricCroCo3DStereo(enc_depth=60000)",
        "AsymmetricCroCo3DStereo(enc_embed_dim=10**30)",
        "AsymmetricCroCo3DStereo(enc_embed_dim=1000000000000)",
        "AsymmetricCroCo3DStereo(mlp_ratio=inf)",
        "AsymmetricCroCo3DStereo(mlp_ratio=(4,))",
        "AsymmetricCroCo3DStereo(mlp_ratio=None)",
        "AsymmetricCroCo3DStereo(pos_embed='RoPE0')",
        "AsymmetricCroCo3DStereo(pos_embed='RoPE" + "9" * 400 + "')",
        "AsymmetricCroCo3DStereo(pos_embed=['RoPE100'])",
        "AsymmetricCroCo3DStereo(img_size=True)",
        "AsymmetricCroCo3DStereo(head_type=['dpt'])",
        "AsymmetricCroCo3DStereo(**{'enc_depth': 1})",
        "AsymmetricCroCo3DStereo(enc_depth=-'a')",
    ],
)
def test_odd_descriptions_of_the_model(text: object) -> None:
    with pytest.raises(UserError) as error:
        network_arguments(text)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


def test_networks_that_cannot_be_built(tmp_path: Path) -> None:
    state = dust3r_state("tiny")
    for odd in ("enc_num_heads=3", "dec_num_heads=5", "patch_size=7", "mlp_ratio=1e-9", "dec_depth=1"):
        text = f"AsymmetricCroCo3DStereo(enc_embed_dim=32, enc_depth=1, enc_num_heads=2, {odd})"
        text = text.replace("enc_num_heads=2, enc", "enc")
        torch.save({"args": argparse.Namespace(model=text), "model": state}, tmp_path / "odd.pth")
        with pytest.raises(UserError):
            load_dust3r(tmp_path / "odd.pth")


@both
def test_damaged_bytes_are_found_by_the_files_own_checksums(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.ckpt"
    if kind == "dust3r":
        write_dust3r(path, "tiny", dust3r_state("tiny"))
    else:
        write_viewcrafter(path, viewcrafter_state(viewcrafter_spec("tiny")))
    pieces: list[int] = []
    assert len(checked_sha256(path, pieces.append)) == 64
    assert sum(pieces) > 1.9 * path.stat().st_size
    with path.open("r+b") as stream:  # the middle of a tensor
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    READERS[kind](path)
    if kind == "dust3r":
        assert "is damaged at" in refused(lambda file: read_dust3r(file, verify=True), path)
    assert "is damaged at" in refused(checked_sha256, path)
    assert "download it again" in refused(checked_sha256, path)
