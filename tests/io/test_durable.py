"""Files that are there whole or not at all; deaths and full disks are in tests/data/test_shards.py."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from fvgen.io.durable import (
    STALE_S,
    durable_file,
    is_partial,
    partial_folder,
    remove_partial,
    remove_stale,
    whole_folder,
    write_durably,
    write_json_durably,
)


def test_a_block_that_fails_keeps_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with durable_file(path) as part:
            part.write_bytes(b"half")
            assert is_partial(part)
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_what_the_block_wrote_takes_the_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with durable_file(path) as first, durable_file(path) as second:  # two writers at once
        assert first != second
        for part in (first, second):
            part.write_bytes(part.name.encode())
    assert path.read_text() == first.name
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), durable_file(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_durably(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_json(tmp_path: Path) -> None:
    write_json_durably(tmp_path / "file", {"a": [1, None], "é": "ü"}, indent=2)
    text = (tmp_path / "file").read_text()
    assert json.loads(text) == {"a": [1, None], "é": "ü"}
    assert text.startswith('{\n  "a"')
    assert text.endswith("}\n")


def test_a_folder_replaces_another(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with whole_folder(tmp_path / "set") as new:
            new.mkdir()
            (new / "file").write_text(content)
        assert [p.name for p in tmp_path.iterdir()] == ["set"]
        assert (tmp_path / "set" / "file").read_text() == content


@pytest.mark.parametrize("renames", [0, 1])
def test_a_folder_stays_where_its_successor_fails(renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "set"
    path.mkdir()
    (path / "file").write_text("old")
    really, done = os.replace, []

    def interrupted(source: Path, target: Path) -> None:
        done.append(target)
        if len(done) == renames + 1:
            raise KeyboardInterrupt
        really(source, target)

    def write() -> None:
        with whole_folder(path) as new:
            new.mkdir()

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert (path / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_stale_files_go_and_folders_stay(tmp_path: Path) -> None:
    file, folder = tmp_path / ".file.partial-1", tmp_path / ".set.partial-1"
    file.write_bytes(b"x")
    folder.mkdir()
    for path in (file, folder):
        os.utime(path, (time.time() - STALE_S - 60,) * 2)
    remove_stale(tmp_path)
    assert list(tmp_path.iterdir()) == [folder]


def _killed(folder: Path, event: int) -> None:
    """Replaces a file and two folders, and is killed at the ``event``-th rename."""
    really, count = os.replace, [0]

    def replace(source: Path, target: Path) -> None:
        count[0] += 1
        if count[0] == event:
            os.kill(os.getpid(), signal.SIGKILL)
        really(source, target)

    os.replace = replace  # type: ignore[assignment]
    write_durably(folder / "file", b"new")
    for name in ("set", "other.partial-set"):
        with whole_folder(folder / name) as new:
            new.mkdir()
            (new / "content").write_text("new")


@pytest.mark.parametrize(
    ("event", "expected"),
    [(1, ("old", "old", "old")), (2, ("new", "old", "old")), (3, ("new", "new", "old")), (5, ("new", "new", "new"))],
    ids=["file", "folder", "between its renames", "between the renames of the other"],
)
def test_what_a_killed_process_left_is_removed(event: int, expected: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for name in ("set", "other.partial-set"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text("old")
    process = get_context("spawn").Process(target=_killed, args=(tmp_path, event))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert any(is_partial(p) for p in tmp_path.iterdir())
    remove_partial(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "set", "other.partial-set"}
    contents = [tmp_path / name for name in ("file", "set/content", "other.partial-set/content")]
    assert tuple(p.read_text() for p in contents) == expected
    remove_partial(tmp_path / "nowhere")


@pytest.mark.parametrize("event", [1, 2], ids=["folder", "between its renames"])
def test_a_folder_written_again_removes_what_a_killed_process_left(event: int, tmp_path: Path) -> None:
    for content in ("old", "new"):
        if content == "new":
            process = get_context("spawn").Process(target=_killed, args=(tmp_path, event + 1))
            process.start()
            process.join()
            assert len(list(tmp_path.glob(".set.partial-*"))) == 1
        with whole_folder(tmp_path / "set") as new:
            new.mkdir()
            (new / "content").write_text(content)
    assert {p.name for p in tmp_path.iterdir()} == {"file", "set"}
    assert (tmp_path / "set" / "content").read_text() == "new"


def test_a_folder_that_was_taken_for_a_dead_one_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may look between the making of a folder and its lock."""
    path, really, made = tmp_path / "set", tempfile.mkdtemp, []
    path.mkdir()

    def make(**options: object) -> str:
        made.append(folder := really(**options))
        if len(made) == 1:
            with partial_folder(path):  # at its end it looks
                pass
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", make)
    with partial_folder(path) as folder:
        assert len(made) == 3
        assert not Path(made[0]).exists()
        assert list(folder.iterdir()) == []
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_removed_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    left = tmp_path / ".set.partial-0"
    left.mkdir()
    with whole_folder(tmp_path / "set") as new:
        new.mkdir()
    assert sorted(tmp_path.iterdir()) == [left, tmp_path / "set"]
