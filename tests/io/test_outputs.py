from __future__ import annotations

import errno
import os
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest

from fvgen.io.outputs import check_output, output_directory
from fvgen.utils.errors import UserError


def test_appears_whole(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    with output_directory(place) as out:
        (out / "report.json").write_text("1")
        assert not place.exists()
        assert out.parent == place.parent
        assert out.name.startswith(".b.partial-")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert (place / "report.json").read_text() == "1"


def test_replaces_only_results(tmp_path: Path) -> None:
    place = tmp_path / "out"
    place.mkdir()
    with pytest.raises(UserError, match="--overwrite"):
        check_output(place)
    with output_directory(place, overwrite=True) as out:  # empty
        (out / "report.json").write_text("1")
    with output_directory(place, overwrite=True) as out:
        (out / "report.json").write_text("2")
    assert (place / "report.json").read_text() == "2"
    (place / "report.json").rename(place / "other.txt")
    with pytest.raises(UserError, match="other files"):
        check_output(place, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), UserError("x")])
def test_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        with output_directory(tmp_path / "a" / "b") as out:
            (out / "half").write_text("x")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert not list(tmp_path.iterdir())


def test_failure_keeps_the_old(tmp_path: Path) -> None:
    with output_directory(tmp_path / "out") as out:
        (out / "report.json").write_text("old")
    with pytest.raises(RuntimeError), output_directory(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "report.json").read_text() == "old"


def test_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="are needed"):
        check_output(tmp_path / "out", need_bytes=10**18)
    with pytest.raises(UserError, match="disk is full"), output_directory(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def _write(place: Path, killed_at: int) -> None:
    """Writes a result, over an earlier one if there is one, and is killed at that rename; 0: while it writes."""
    really, count = os.rename, [0]

    def rename(source: Path, target: Path) -> None:
        count[0] += 1
        if count[0] == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        really(source, target)

    os.rename = rename  # type: ignore[assignment]
    with output_directory(place, overwrite=True) as out:
        (out / "report.json").write_text("killed")
        if killed_at == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _killed(place: Path, at: int) -> None:
    process = get_context("spawn").Process(target=_write, args=(place, at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _contents(folder: Path) -> list[str]:
    return sorted(f.read_text() for f in folder.glob("**/report.json"))


def test_what_killed_processes_left_goes_with_the_next_result(tmp_path: Path) -> None:
    place = tmp_path / "out"
    others = [tmp_path / ".out2.partial-x", tmp_path / ".out.partial-x.partial-y"]
    for other in others:
        other.mkdir()
    for at in (0, 1):
        _killed(place, at)
    assert len(_contents(tmp_path)) == 2
    with output_directory(place) as out:
        (out / "report.json").write_text("new")
    assert sorted(tmp_path.iterdir()) == sorted([place, *others])
    assert _contents(tmp_path) == ["new"]


def test_what_was_out_of_its_place_stays_until_there_is_a_newer_one(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with output_directory(place) as out:
        (out / "report.json").write_text("old")
    _killed(place, 2)
    assert _contents(tmp_path) == ["killed", "old"]
    assert not place.exists()
    with pytest.raises(RuntimeError), output_directory(place):
        raise RuntimeError
    assert _contents(tmp_path) == ["killed", "old"]
    with output_directory(place) as out:
        (out / "report.json").write_text("new")
    assert list(tmp_path.iterdir()) == [place]
    assert _contents(tmp_path) == ["new"]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    place = tmp_path / "out"
    with output_directory(place) as slow:
        with output_directory(place) as quick:
            (quick / "report.json").write_text("quick")
        check_output(place, overwrite=True)
        assert sorted(tmp_path.iterdir()) == sorted([place, slow])
        (slow / "report.json").write_text("slow")
    assert list(tmp_path.iterdir()) == [place]
    assert _contents(tmp_path) == ["slow"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "x")])
def test_between_the_renames_the_old_is_kept(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "out"
    with output_directory(place) as out:
        (out / "report.json").write_text("old")
    really, done = os.rename, []

    def rename(source: Path, target: Path) -> None:
        done.append(target)
        if len(done) == 2:
            raise error
        really(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(type(error)), output_directory(place, overwrite=True) as out:
        (out / "report.json").write_text("new")
    assert list(tmp_path.iterdir()) == [place]
    assert _contents(tmp_path) == ["old"]
