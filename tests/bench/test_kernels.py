from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fvgen import kernels
from fvgen.bench.kernels import choose_specs, measure_kernel, measure_kernels, working_dtype
from fvgen.bench.raster import Scene, measure_raster, measure_scene, scenes
from fvgen.kernels._spec import OpSpec
from fvgen.utils.errors import UserError

SPECS = {spec.name: spec for spec in kernels.iter_specs()}


def measure(spec: OpSpec, compile: bool = False) -> dict:
    return measure_kernel(spec, spec.cases[0], "cpu", 1e10, rounds=2, compile=compile)


def test_two_operators():
    said: list[str] = []
    measured = list(measure_kernels("cpu", 1e10, ["geglu", "render_points"], 2, compile=False, quick=True, say=said.append))
    records, figures = measured[::2], measured[1::2]
    assert [r["name"] for r in records] == ["kernel_geglu_small_ms", "kernel_render_points_small_ms"]
    assert [r["name"] for r in figures] == ["kernel_geglu_bandwidth_fraction", "kernel_render_points_bandwidth_fraction"]
    assert [f["value"] for f in figures] == [r["bandwidth_fraction"] for r in records]
    assert [r["dtype"] for r in records] == ["bfloat16", "float32"]
    assert said == ["[1/2] geglu small", "[2/2] render_points small"]
    for r in records:
        spec = SPECS[r["op"]]
        cost = spec.cost(*spec.cases[0].make("cpu", getattr(torch, r["dtype"])))
        assert (r["bytes"], r["flops"]) == (cost.bytes, cost.flops)
        assert r["bandwidth_fraction"] == pytest.approx(cost.bytes / (1e-3 * r["median_ms"]) / 1e10)
        assert r["vs_reference"] == pytest.approx(r["others"]["reference"]["median_ms"] / r["median_ms"])
        assert r["vs_compile"] is None
        assert r["unit"] == "ms"
    assert set(records[0]["others"]) == {"reference", "eager"}


def test_every_operator_with_benchmark_shapes_is_measured():
    assert {s.name for s in choose_specs()} == {name for name, s in SPECS.items() if s.benchmarks}
    assert {s.name for s in choose_specs(quick=True)} == set(SPECS)
    with pytest.raises(UserError, match="there is no operator 'gelu'"):
        choose_specs(["gelu"])
    with pytest.raises(UserError, match="--quick"):
        choose_specs(["composite_points"])


def test_dtype_is_what_the_gpu_version_takes():
    assert {name for name in SPECS if working_dtype(SPECS[name], "cpu") == torch.float32} >= {"render_points", "composite_points"}
    assert working_dtype(SPECS["group_norm_silu"], "cpu") == torch.bfloat16


def test_a_failing_baseline_does_not_stop_the_run():
    def broken(_x):
        raise RuntimeError("no such kernel\nin two lines")

    record = measure(replace(SPECS["geglu"], baselines={"broken": broken, "eager": SPECS["geglu"].reference}))
    assert record["others"]["broken"] == {"median_ms": None, "failed": "RuntimeError: no such kernel"}
    assert record["median_ms"] > 0
    assert record["others"]["reference"]["median_ms"] > 0


def test_a_failing_operator_is_a_record():
    def broken(*_):
        raise ValueError("bad case")

    record = measure_kernel(SPECS["geglu"], replace(SPECS["geglu"].cases[0], make=broken), "cpu", 1e10)
    assert (record["median_ms"], record["failed"]) == (None, "ValueError: bad case")


def test_compiled_version(monkeypatch):
    compiled: list[object] = []

    def compile(function, dynamic):
        compiled.append(function)
        assert dynamic is False
        return function

    monkeypatch.setattr(torch, "compile", compile)
    spec = SPECS["geglu"]
    record = measure(spec, compile=True)
    assert compiled == [spec.baselines["eager"]]
    assert record["vs_compile"] == pytest.approx(record["others"]["torch.compile"]["median_ms"] / record["median_ms"])

    def refuse(*_):
        raise RuntimeError("cannot compile")

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: refuse)
    record = measure(spec, compile=True)
    assert record["vs_compile"] is None
    assert record["others"]["torch.compile"]["failed"] == "RuntimeError: cannot compile"


@pytest.mark.slow
def test_torch_compile_itself():
    record = measure(SPECS["geglu"], compile=True)
    assert "torch.compile" in record["others"]


class TestRaster:
    def test_names_that_are_quoted(self):
        names = [s.name for s in scenes()]
        quoted = ["raster_16x327680_320x512_ms", "raster_25x294912_288x512_ms", "raster_16x4M_576x1024_ms"]
        assert {*quoted, "raster_backward_16x327680_320x512_ms"} <= set(names)
        assert len(set(names)) == len(names)
        spec = SPECS["render_points"]
        for name, case in zip(quoted, spec.benchmarks, strict=True):
            assert name == f"raster_{case.name}_ms"

    def test_named_scenes_are_those_of_the_spec(self):
        (first, *_), (case, *_) = scenes(), SPECS["render_points"].benchmarks
        assert all(
            torch.equal(a, b) if torch.is_tensor(a) else a == b
            for a, b in zip(first.make("cpu"), case.make("cpu", torch.float32), strict=True)
        )

    def test_the_sweep_on_the_cpu(self):
        records = list(measure_raster("cpu", 1, quick=True))
        assert [r["name"] for r in records] == [s.name for s in scenes(quick=True)]
        assert all(r["median_ms"] > 0 and "failed" not in r for r in records)
        assert {r["backward"] for r in records} == {True, False}
        assert records[0]["points"] == 2 * 16 * 24

    def test_a_scene_that_fails_is_a_record(self):
        record = measure_scene(Scene(views=1, sources=1, rows=2, cols=2, size=(4, 4), k=-1), "cpu", 1)
        assert record["median_ms"] is None
        assert record["failed"]
