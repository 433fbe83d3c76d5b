"""A path in pieces on two processes under torchrun: the bytes of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fvgen.utils.device import take_gpu
from fvgen.utils.errors import UserError
from fvgen.workers import Workers
from tests.cli.conftest import Photos, Run
from tests.processes import environment


def _launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--standalone"]
    every = [*command, "-m", "fvgen.cli", *map(str, arguments)]
    return subprocess.run(every, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), timeout=300)


def _contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and p.suffix != ".json"}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def test_two_processes_write_what_one_does(scene: Photos, model: str, tmp_path: Path, device: str) -> None:
    """Four segments, every other one of the second process; the order of frames is that of one."""
    command = ["generate", *scene.all, "--cameras", scene.cameras, "--frames", 3, "--steps", 2, "--device", device]
    command += ["--model", model if device == "cpu" else "tiny"]
    alone = [sys.executable, "-m", "fvgen.cli", *map(str, command), "--clips-at-once", "1", "--output", str(tmp_path / "one")]
    first = subprocess.run(alone, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    done = _launch(*command, "--clips-at-once", 1, "--output", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = _contents(tmp_path / "one"), _contents(tmp_path / "two")
    assert len([name for name in one if name.startswith("frames")]) == 9
    assert one == two
    assert done.stdout.count(str(tmp_path / "two" / "video.mp4")) == 1


@pytest.mark.slow
def test_bad_input_ends_all_processes(scene: Photos, model: str, tmp_path: Path) -> None:
    done = _launch(
        "generate", *scene.photos[:2], "--model", model, "--truth", "none", "--device", "cpu", "--output", tmp_path / "o"
    )
    assert done.returncode != 0
    assert done.stderr.count("fvgen: error: ") == 1
    assert "the folder of true frames none does not exist" in done.stderr
    assert not list(tmp_path.iterdir())


def test_alone() -> None:
    assert Workers().share(lambda: 3) == 3
    assert Workers().gather({0: "a"}) == {0: "a"}


def test_a_broken_launcher(fvgen: Run, scene: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = fvgen("generate", *scene.photos[:2], "--output", tmp_path / "out")
    assert status == 2
    assert "do not fit" in err


class Taken(Exception):
    """The number of the GPU that a process makes its own."""


@pytest.mark.parametrize(
    "line",
    [
        "generate {a} {b} --output {new}",
        "prepare {new} --output {new}",
        "distill --output {new}",
        "bench views --quick",
        "bench train --model tiny --quick",
    ],
    ids=lambda line: " ".join(line.split()[:2]).partition(" {")[0],
)
def test_the_first_touch_of_a_process_is_on_its_own_gpu(
    line: str, fvgen: Run, scene: Photos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all processes of a machine would hold memory of the first one's GPU."""

    def take(device: object) -> None:
        raise Taken(device if isinstance(device, int) else torch.device(str(device)).index)

    def touch() -> None:
        raise AssertionError("CUDA begins before the process has a GPU of its own")

    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touch)  # all that opens a context begins with it
    words = line.format(a=scene.photos[0], b=scene.photos[1], new=tmp_path / "new").split()
    with pytest.raises(Taken) as taken:
        fvgen(*words, "--device", "auto")
    assert taken.value.args == (1,)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU: there are 2; start fewer"):
        take_gpu(2)
