from __future__ import annotations

import errno
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
