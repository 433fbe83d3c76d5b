"""Processes that share the clips of a path, beside one of them alone; gloo on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fvgen.bench.model import stored_model
from fvgen.bench.report import report_text
from fvgen.bench.views import five_photos, measure_views
from fvgen.pipeline import find_model
from fvgen.workers import Workers
from tests.processes import environment


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def test_two_processes(tmp_path: Path, device: str) -> None:
    file = tmp_path / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fvgen.cli"]
    command += ["bench", "views", "--quick", "--device", device, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("records in") == 1  # of the first process alone
    one, halves, two = json.loads(file.read_text())
    assert [r["name"] for r in (one, halves, two)] == ["views8_x1_tiny_s", "views8_x1_by2_tiny_s", "views8_x2_tiny_s"]
    assert [(r["processes"], r["clips_at_once"], r["new_views"]) for r in (one, halves, two)] == [(1, 4, 8), (1, 2, 8), (2, 2, 8)]
    assert two["same_bytes"]
    assert "failed" not in two
    assert two["times_as_fast"] == pytest.approx(min(one["median_s"], halves["median_s"]) / two["median_s"])
    text = report_text([one, halves, two], {})
    assert "| `views8_x1_by2_tiny_s` | tiny | trained | 8 | 1 | 2 |" in text
    assert "| `views8_x2_tiny_s` | tiny | trained | 8 | 2 | 2 |" in text
    assert two["command"].startswith("torchrun --nproc-per-node 2 -m fvgen.cli bench views --quick")


class Liar(Workers):
    """Two processes of which this is the first; the second sends the first one's clips instead of its own."""

    def share(self, make):
        return make()

    def gather(self, mine):
        return {**mine, 1: mine[0]} if mine else {}


@pytest.mark.slow
def test_other_bytes_are_a_failed_record() -> None:
    model = stored_model("tiny", find_model("tiny"))
    *_, last = measure_views(model, Liar(0, 2), 1, quick=True)
    assert last["name"] == "views8_x2_tiny_s"
    assert not last["same_bytes"]
    assert "differ from those of one process" in last["failed"]


def test_a_path_through_five_photos() -> None:
    prepared = five_photos(stored_model("tiny", find_model("tiny")), "cpu", quick=True)
    assert prepared.photo_frames == (0, 3, 6, 9, 12)
    assert [len(s) for s in prepared.segments] == [4] * 4
    assert prepared.renders.rgb.shape == (13, 3, 64, 96)
    assert prepared.renders.coverage.float().mean((1, 2)).min() > 0.6  # the clouds are where the cameras look
    assert torch.equal(prepared.renders.rgb[3], prepared.photos[1])
