"""What goes to TensorBoard and Weights & Biases, the latter played by a module that takes notes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fvgen.distill.logs import LOSSES, PROGRESS, RunLog
from fvgen.io.contact_sheet import write_contact_sheet
from fvgen.io.video import write_video

from .small import CADENCE, small_trainer


class FakeWandb(ModuleType):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.ended = 0

    def init(self, **options: Any) -> Any:
        self.started.append(options)
        return SimpleNamespace(log=self.logged.append, finish=lambda: setattr(self, "ended", self.ended + 1))

    def __getattr__(self, name: str) -> Any:
        if name in ("Histogram", "Image", "Video", "Table"):
            return lambda *values, **options: (name, values, options)
        raise AttributeError(name)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    found = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def test_weights_and_biases_gets_what_tensorboard_gets(wandb: FakeWandb, tmp_path: Path) -> None:
    folder = tmp_path / "a run: #1?"  # none of these characters may be in an id
    folder.mkdir()
    log = RunLog(folder, True, wandb=True, config={"lr": 1})
    samples = {name: torch.tensor([0.1, 0.7]) for name in ("logit_real", "logit_fake", "weight")}
    samples["time"] = torch.tensor([100.0, 900.0])
    log.scalars({"stage1/x": 1.0}, 3)
    log.histograms({"stage": 1, "iteration": 3}, samples, {})
    sheet = folder / "validation"
    sheet.mkdir()
    frames = torch.rand(2, 3, 16, 16)
    write_contact_sheet(sheet / "contact_sheet.png", [("row", frames)])
    write_video(sheet / "clip0.mp4", frames)
    log.media("stage1", sheet, 3)
    log.media("stage1", folder / "nothing", 3)
    log.close()
    (started,) = wandb.started
    assert re.fullmatch(r"[0-9a-f]+", started["id"])
    assert (started["name"], started["resume"], wandb.ended) == (folder.name, "allow", 1)
    RunLog(folder, True, wandb=True).close()
    assert wandb.started[1]["id"] == started["id"]  # a continued run goes on there
    RunLog(tmp_path, True, wandb=True).close()
    assert wandb.started[2]["id"] != started["id"]
    told = {name: value for entry in wandb.logged for name, value in entry.items()}
    assert told["stage1/x"] == 1.0
    assert told["stage1/weight/t0-199"][0] == "Histogram"
    assert told["stage1/weight/t0-199"][1][0].tolist() == pytest.approx([0.1])
    assert told["stage1/logit_real"][0] == "Histogram"
    assert told["stage1/calibration"][0] == "Table"
    assert told["stage1/contact_sheet"] == ("Image", (str(sheet / "contact_sheet.png"),), {})
    assert told["stage1/clip0"][:2] == ("Video", (str(sheet / "clip0.mp4"),))
    assert all(entry["iteration"] == 3 for entry in wandb.logged)


def test_tensorboard_shows_the_contact_sheet(tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed: pip install fvgen[train]"
    )
    log = RunLog(tmp_path, True)
    write_contact_sheet(tmp_path / "contact_sheet.png", [("row", torch.rand(2, 3, 16, 16))])
    log.media("stage2", tmp_path, 7)
    log.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (image,) = events.Images("stage2/contact_sheet")
    assert image.step == 7


def test_other_ranks_keep_silent(wandb: FakeWandb, tmp_path: Path) -> None:
    log = RunLog(tmp_path, False, wandb=True)
    log.media("stage1", tmp_path, 1)
    log.close()
    assert not wandb.started
    assert not list(tmp_path.iterdir())


def test_no_line_comes_twice_after_an_interruption(tmp_path: Path) -> None:
    """Killed after lines that no checkpoint has seen, the last of them half written."""
    cadence = type(CADENCE)(log=1, checkpoint=100, keep=2, validate=0)
    trainer = small_trainer(tmp_path, cadence=cadence)
    for update in range(6):
        if update == 4:
            trainer.save()
        trainer.advance()
        if trainer.phase == 0:
            trainer.collect()
    trainer.close()
    with (tmp_path / PROGRESS).open("a") as file:
        file.write('{"stage": 2, "iteration": 3, "clips')
    small_trainer(tmp_path, cadence=cadence).run(4)
    lines = [json.loads(line) for line in (tmp_path / PROGRESS).read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert [json.loads(line)["step"] for line in (tmp_path / LOSSES).read_text().splitlines()] == list(range(8))
