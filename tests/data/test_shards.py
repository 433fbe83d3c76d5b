"""Shards written, read at random, damaged and lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fvgen.data import shards
from fvgen.data.shards import CLIP_KEYS, INFO, ShardSet, ShardWriter, shard_name
from fvgen.io.durable import STALE_S, is_partial, write_durably
from fvgen.utils.errors import UserError

COUNTS = (3, 0, 2, 1)  # clips of each shard: one of them lost all


def clip(number: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(number)
    shapes = {"clean": (4, 3, 5, 8), "render": (4, 3, 5, 8), "image_tokens": (6, 7), "world_from_cam": (3, 4, 4), "K": (3, 3, 3)}
    tensors = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    tensors["render"] = tensors["render"].half()
    return tensors | {"fps": torch.tensor(10 + number), "coverage": torch.rand(3, 4, 5, generator=made) > 0.5}


def write(directory: Path, skip: tuple[int, ...] = ()) -> ShardWriter:
    directory.mkdir(exist_ok=True)
    (directory / INFO).write_text(json.dumps({"seed": 3}))
    writer = ShardWriter(directory, len(COUNTS))
    writer.write_constants({"text_tokens": torch.ones(77, 7), "uncond_context": torch.zeros(83, 7)})
    for number, count in enumerate(COUNTS):
        if number not in skip:
            first = sum(COUNTS[:number])
            clips = [clip(first + i) for i in range(count)]
            writer.write(number, clips, {"clips": [{"scene": f"s{first + i}"} for i in range(count)], "rejected": []}, {})
    return writer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write(tmp_path / "set").finish()
    return tmp_path / "set"


def test_round_trip(directory: Path) -> None:
    found = ShardSet(directory, (*CLIP_KEYS, "coverage"))
    assert len(found) == sum(COUNTS) == 6
    for i in (5, 0, 3, 1, 4, 2):
        for key, value in clip(i).items():
            got = found[i][key]
            assert got.dtype == (torch.float32 if value.is_floating_point() else value.dtype)
            assert torch.equal(got, value.to(got.dtype)), key
        assert found.describe(i) == {"scene": f"s{i}"}
    assert torch.equal(found[-1]["clean"], found[5]["clean"])
    for i in (6, -7):
        with pytest.raises(IndexError):
            found[i]
    assert found.info == {"seed": 3}
    assert found.constants["text_tokens"].shape == (77, 7)
    assert set(ShardSet(directory)[0]) == set(CLIP_KEYS)
    with pytest.raises(UserError, match="keep-frames"):
        ShardSet(directory, ("clean_rgb",))[0]


def test_workers_and_many_shards(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ShardSet(directory)
    assert found[0]  # with a file already mapped
    batches = list(DataLoader(found, batch_size=2, num_workers=2))
    assert torch.equal(torch.cat([b["clean"] for b in batches]), torch.stack([clip(i)["clean"] for i in range(6)]))
    assert torch.equal(pickle.loads(pickle.dumps(found))[4]["K"], clip(4)["K"])
    monkeypatch.setattr(shards, "_OPEN", 1)
    assert [int(found[i]["fps"]) for i in (0, 5, 3, 1)] == [10, 15, 13, 11]
    assert len(found._mapped) == 1


def test_a_flipped_bit_is_found(directory: Path) -> None:
    ShardSet(directory).verify()
    for name in (shard_name(2), "constants.safetensors", INFO):
        path = directory / name
        before = path.read_bytes()
        path.write_bytes(before[:-2] + bytes([before[-2] ^ 4]) + before[-1:])
        damaged = ShardSet(directory) if name != INFO else None
        if damaged:
            with pytest.raises(UserError, match=f"{name} is damaged; delete it"):
                damaged.verify()
        path.write_bytes(before)
    ShardSet(directory).verify()


def test_missing_and_cut_files(directory: Path) -> None:
    path = directory / shard_name(0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=f"{shard_name(0)} is damaged; delete it"):
        ShardSet(directory)
    path.unlink()
    with pytest.raises(UserError, match=f"{shard_name(0)} is missing"):
        ShardSet(directory)
    path.write_bytes(whole)
    found = ShardSet(directory)
    path.write_bytes(b"\0" * len(whole))  # between opening the set and reading the clip
    with pytest.raises(UserError, match=f"{shard_name(0)} is damaged"):
        found[0]
    (directory / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        ShardSet(directory)
    (directory / "index.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        ShardSet(directory)
    with pytest.raises(UserError, match="holds no prepared clips"):
        ShardSet(directory / "elsewhere")


def test_an_index_needs_every_shard(tmp_path: Path) -> None:
    writer = write(tmp_path / "set", skip=(1, 3))
    with pytest.raises(UserError, match=r"2 of 4 shards are not there yet \(1, 3\)"):
        writer.finish()
    assert not (tmp_path / "set" / "index.json").exists()
    assert writer.missing() == [1, 3]
    writer.write(1, [], {"clips": [], "rejected": []}, {})
    (tmp_path / "set" / shard_name(3)).write_bytes(b"what a copy that was cut short has left")
    assert writer.missing() == [3]
    other = tmp_path / "other"
    write(other)
    (other / INFO).write_text("{}")  # shards of a set with other settings do not count
    assert ShardWriter(other, 4).missing() == [0, 1, 2, 3]


def test_same_clips_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a").finish()
    write(tmp_path / "b").finish()
    files = sorted(os.listdir(tmp_path / "a"))
    assert files == sorted(os.listdir(tmp_path / "b"))
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_death_while_writing_leaves_the_old_or_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, step, die)
        patch.setattr(Path, "unlink", lambda *_a, **_k: None)  # a killed process does not clean up
        with pytest.raises(Killed):
            write_durably(path, b"new")
    assert path.read_bytes() == b"old"
    left = [p for p in tmp_path.iterdir() if p != path]
    assert len(left) == 1
    assert is_partial(left[0])
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"
    write_durably(path, b"newer", keep=True)
    assert path.read_bytes() == b"new"


def test_finishing_removes_what_dead_processes_left(tmp_path: Path) -> None:
    writer = write(tmp_path / "set")
    for name, age in (("old", STALE_S + 60), ("new", 0)):
        path = tmp_path / "set" / f".clips-00001.safetensors.partial-{name}"
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    writer.finish()
    names = {INFO, "index.json", "constants.safetensors", *map(shard_name, range(4))}
    assert set(os.listdir(tmp_path / "set")) == names | {path.name}  # somebody may still be writing the new one


def test_a_full_disk_and_a_disk_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> Callable[..., None]:
        def raise_error(*_: object) -> None:
            raise OSError(number, os.strerror(number))

        return raise_error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(errno.ENOSPC))
        with pytest.raises(UserError, match="the disk is full"):
            write_durably(tmp_path / "file", b"x")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "link", fail(errno.EPERM))
    for data in (b"first", b"second"):
        write_durably(tmp_path / "file", data, keep=True)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"first"]
