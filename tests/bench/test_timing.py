from __future__ import annotations

import os
import time

import pytest
import torch

from fvgen.bench import timing
from fvgen.bench.bandwidth import copy_bandwidth, matmul_rate
from fvgen.bench.timing import Timing, cold_copies, strict_kernels, time_calls, time_once


def test_a_known_sleep():
    found = time_calls(lambda: time.sleep(0.02), rounds=8)
    assert found.count == 8
    assert found.method == "perf_counter"
    assert 20.0 <= found.min_ms < 26.0
    assert found.min_ms <= found.p10_ms <= found.median_ms <= found.p90_ms


def test_summary_of_readings():
    assert Timing.of([11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6], "x") == Timing(6, 2, 10, 1, 11, "x")
    assert Timing.of([3.0], "x") == Timing(3.0, 3.0, 3.0, 3.0, 1, "x")


def test_seconds():
    assert Timing.of([3000.0, 1000.0], "x").seconds() == {
        "median_s": 2.0, "p10_s": pytest.approx(1.2), "p90_s": pytest.approx(2.8), "min_s": 1.0, "count": 2, "method": "x"
    }  # fmt: skip


def test_one_call():
    assert 20.0 <= time_once(lambda: time.sleep(0.02), "cpu") < 40.0


def test_slow_calls_get_fewer_rounds():
    assert 1 <= time_calls(lambda: time.sleep(0.02), rounds=1000, seconds=0.1).count <= 5
    assert time_calls(lambda: time.sleep(0.02), rounds=1000, seconds=0.001).count == 1


def test_calls_are_taken_in_turn():
    seen = []
    time_calls([lambda n=n: seen.append(n) for n in range(3)], rounds=6)
    assert seen[-6:] == [0, 1, 2, 0, 1, 2]


def test_copies_exceed_twice_the_cache(monkeypatch):
    monkeypatch.setattr(timing, "l2_bytes", lambda _device: 1000)
    args = (torch.arange(1.0, 26.0), "mode", torch.empty(0), 3)
    copies = cold_copies(args, "cpu")
    assert 100 * len(copies) > 2000 >= 100 * (len(copies) - 1)
    assert copies[0] is args
    assert len({c[0].data_ptr() for c in copies}) == len(copies)
    assert all(torch.equal(c[0], args[0]) and c[1::2] == ("mode", 3) for c in copies)
    assert len(cold_copies(args, "cpu", most=4)) == 4
    assert len(cold_copies((torch.ones(1000),), "cpu")) == 2


def test_zeros_are_refused():
    with pytest.raises(ValueError, match="only zeros"):
        cold_copies((torch.ones(3), torch.zeros(2, 3)), "cpu")
    cold_copies((torch.zeros(3, dtype=torch.int64), torch.zeros(0)), "cpu")


def test_strictness_ends_with_the_block(monkeypatch):
    monkeypatch.delenv("FVGEN_KERNELS", raising=False)
    with strict_kernels():
        assert os.environ["FVGEN_KERNELS"] == "strict"
    assert "FVGEN_KERNELS" not in os.environ


def test_rates_follow_from_the_times():
    rate, found = copy_bandwidth("cpu", size_bytes=2**20, rounds=3)
    assert rate == pytest.approx(2 * 2**20 / (1e-3 * found.median_ms))
    assert found.method == "perf_counter"
    rate, found = matmul_rate("cpu", size=64, rounds=3)
    assert rate == pytest.approx(2 * 64**3 / (1e-3 * found.median_ms))


@pytest.mark.gpu
class TestOnGpu:
    def test_graph_leaves_launches_out(self):
        copies = cold_copies((torch.randn(2**10, device="cuda"),), "cuda", most=64)
        calls = [lambda x=x: x.sin().cos().exp() for (x,) in copies]
        graph, events = time_calls(calls, "cuda", graph=True), time_calls(calls, "cuda")
        assert (graph.method, events.method) == ("cuda graph", "cuda events")
        assert graph.median_ms < events.median_ms

    @pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()], ids=["item", "synchronize"])
    def test_what_cannot_be_captured_is_timed_with_events(self, wait):
        """And spoils neither the stream nor later captures."""
        x = torch.randn(1000, device="cuda")
        before = torch.cuda.current_stream()
        assert time_calls(lambda: wait(x.cos()), "cuda", graph=True).method == "cuda events"
        assert torch.cuda.current_stream() == before
        torch.cuda.empty_cache()
        assert time_calls(lambda: x.sin(), "cuda", graph=True).method == "cuda graph"

    def test_copies_do_not_fit_the_cache(self):
        copies = cold_copies((torch.randn(2**20, device="cuda"),), "cuda")
        assert timing.l2_bytes("cuda") > 2**20
        assert sum(x.nbytes for (x,) in copies) > 2 * timing.l2_bytes("cuda")

    def test_bandwidth_is_plausible(self):
        rate, found = copy_bandwidth("cuda")
        assert 1e11 < rate < 2e13
        assert found.method == "cuda events"
