"""The summary of measured figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.record import main

RECORD = {"name": "raster_ms", "median_ms": 1.5, "commit": "abc", "command": "python -m benchmarks.x"}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def run(folder: Path, records: object) -> dict:
    result = folder / "run.json"
    result.write_text(json.dumps(records))
    assert main([str(result)]) == 0
    return json.loads((folder / "summary.json").read_text())


def test_figures_are_added_and_replaced(tmp_path, capsys):
    first = run(
        tmp_path, [RECORD, {"name": "clip", "value": 2, "unit": "s", "commit": "abc", "command": "c", "date": "2025-01-02"}]
    )
    assert list(first) == ["clip", "raster_ms"]
    assert first["clip"] == {"value": 2, "unit": "s", "commit": "abc", "command": "c", "date": "2025-01-02"}
    assert first["raster_ms"]["unit"] == "ms"
    second = run(tmp_path, {**RECORD, "median_ms": 1.25, "commit": "def"})
    assert second["raster_ms"]["value"] == 1.25
    assert second["raster_ms"]["commit"] == "def"
    assert second["clip"] == first["clip"]
    assert "1.25 ms (was 1.5)" in capsys.readouterr().out


@pytest.mark.parametrize("lost", ["median_ms", "commit", "command"])
def test_a_figure_without_origin_is_refused(tmp_path, lost, capsys):
    result = tmp_path / "run.json"
    result.write_text(json.dumps([{k: v for k, v in RECORD.items() if k != lost}]))
    assert main([str(result)]) == 2
    assert "raster_ms" in capsys.readouterr().err
    assert not (tmp_path / "summary.json").exists()


def test_a_quick_run_replaces_no_figure(tmp_path, capsys):
    before = run(tmp_path, [RECORD])
    result = tmp_path / "quick.json"
    result.write_text(json.dumps([{**RECORD, "median_ms": 0.1, "command": "fvgen bench raster --quick --json RESULT.json"}]))
    assert main([str(result)]) == 2
    assert "'raster_ms' is of a quick run" in capsys.readouterr().err
    assert json.loads((tmp_path / "summary.json").read_text()) == before


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/summary.json")), ids=lambda p: p.parent.name)
def test_the_recorded_summaries_are_complete(path):
    for name, entry in json.loads(path.read_text()).items():
        assert set(entry) == {"value", "unit", "commit", "command", "date"}, name


def test_figures_in_the_readme_are_recorded():
    text = (RESULTS.parents[1] / "README.md").read_text()
    rows = re.findall(r"^\|[^|]*\| `(\w+)` \| ([\d.]+) (\w+) \|$", text, re.MULTILINE)
    summary = json.loads((RESULTS / "h200" / "summary.json").read_text())
    assert rows
    for name, value, unit in rows:
        digits = len(value.partition(".")[2])
        assert (value, unit) == (f"{summary[name]['value']:.{digits}f}", summary[name]["unit"]), name
