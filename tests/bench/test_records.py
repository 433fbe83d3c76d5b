from __future__ import annotations

import json

import pytest

from fvgen.bench.compare import compare, different_machines, table
from fvgen.bench.record import context, main, read_records, readable, value_of, write_records
from fvgen.utils.errors import UserError
from tests.bench.conftest import timed


def rate(name: str, value: float) -> dict:
    return {"name": name, "value": value, "unit": "clips/s"}


OLD = [timed("slower", 1.0), timed("noise", 1.0), timed("faster", 1.0), rate("low", 100.0), rate("high", 100.0)]
NEW = [timed("slower", 1.06), timed("noise", 1.04), timed("faster", 0.5), rate("low", 94.0), rate("high", 200.0)]


def test_regressions_by_unit():
    changes = {c.name: c for c in compare(OLD, NEW)}
    assert {n for n, c in changes.items() if c.regressed} == {"slower", "low"}
    assert changes["slower"].worse_by == pytest.approx(0.06)
    assert changes["low"].worse_by == pytest.approx(0.06)
    assert changes["faster"].worse_by == pytest.approx(-0.5)
    text = table(list(changes.values()))
    assert text.count("REGRESSION") == 2
    assert "50.0 % better" in text


def test_the_limit_can_be_moved():
    assert not any(c.regressed for c in compare(OLD, NEW, limit=0.1))


def test_failed_measurements():
    failed = {"name": "slower", "median_ms": None, "bytes": 5, "unit": "ms", "failed": "RuntimeError: x"}
    assert value_of(failed) == (None, "ms")
    assert [c.regressed for c in compare(OLD, [failed])] == [True]
    assert [c.regressed for c in compare([failed], NEW)] == [False]
    assert "FAILED NOW" in table(compare(OLD, [failed]))


def test_single_readings_are_shown_but_not_judged():
    (change,) = compare([timed("load", 100.0)], [{**timed("load", 200.0), "count": 1}])
    assert change.worse_by == pytest.approx(1.0)
    assert not change.regressed


def test_nothing_in_common():
    with pytest.raises(UserError, match="no record name in common"):
        compare(OLD, [timed("other", 1.0)])


def test_different_machines():
    assert different_machines(OLD, NEW) is None
    assert "H200 before, H100 now" in str(different_machines(OLD, [{**NEW[0], "gpu": "H100"}]))


def test_files_are_whole_and_come_back(tmp_path):
    file = tmp_path / "new" / "run.json"
    write_records(file, OLD)
    assert read_records(file) == OLD
    assert [p.name for p in file.parent.iterdir()] == ["run.json"]
    (tmp_path / "one.json").write_text(json.dumps(OLD[0]))
    assert read_records(tmp_path / "one.json") == OLD[:1]
    (tmp_path / "summary.json").write_text(json.dumps({"a_ms": {"value": 2.0, "unit": "ms"}}))
    assert [value_of(r) for r in read_records(tmp_path / "summary.json")] == [(2.0, "ms")]


@pytest.mark.parametrize("content", ["{", "3", '["a"]', '[{"value": 1}]', '{"a": 1}'])
def test_other_files_are_refused(tmp_path, content):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(UserError, match="fvgen bench"):
        read_records(file)


def test_summary_leaves_failures_out(tmp_path, capsys):
    write_records(
        tmp_path / "run.json", [timed("good", 1.5), {"name": "bad", "median_ms": None, "bytes": 7, "failed": "out of memory"}]
    )
    assert main([str(tmp_path / "run.json")]) == 0
    assert list(json.loads((tmp_path / "summary.json").read_text())) == ["good"]
    assert "bad: not measured (out of memory)" in capsys.readouterr().out


def test_context_names_its_origin(monkeypatch):
    monkeypatch.setenv("FVGEN_COMMIT", "c0ffee")
    found = context("fvgen bench x")
    assert {"gpu", "driver", "torch", "triton", "cuda", "date"} < set(found)
    assert (found["commit"], found["command"]) == ("c0ffee", "fvgen bench x")


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (19087.3, "19087"), (1.23456, "1.235"), (0.000123456, "0.0001235")])
def test_readable(value, text):
    assert readable(value) == text
