from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fvgen.bench import device
from fvgen.bench.device import GpuState, GpuWatch, read_gpu, watched


class FakeNvml:
    """Answers some questions and notes all of them; what it does not know raises, as an old driver does."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, **answers: Any) -> None:
        self.answers, self.asked = answers, []

    def __getattr__(self, name: str) -> Any:
        def answer(*_arguments: Any) -> Any:
            self.asked.append(name)
            if name not in self.answers:
                raise RuntimeError("NVMLError_NotSupported")
            return self.answers[name]

        return answer


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_gpu("cuda") == GpuState()


def test_without_a_driver(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert read_gpu("cuda") == GpuState()


def test_the_cpu_is_not_asked(monkeypatch):
    nvml = FakeNvml(nvmlInit=None)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert read_gpu("cpu") == GpuState()
    assert nvml.asked == []


def test_what_the_driver_does_not_know_is_none(monkeypatch):
    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetHandleByIndex": "handle",
        "nvmlSystemGetDriverVersion": b"580.1",
        "nvmlDeviceGetName": "NVIDIA H200",
        "nvmlDeviceGetClockInfo": 1980,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x1 | 0x4 | 0x40,
        "nvmlDeviceGetPowerUsage": 412_500,
    }
    nvml = FakeNvml(**answers)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    state = read_gpu("cuda:0")
    assert (state.driver, state.name, state.sm_mhz, state.memory_mhz) == ("580.1", "NVIDIA H200", 1980, 1980)
    assert state.throttled == ("power cap", "thermal (hardware)")
    assert state.power_w == pytest.approx(412.5)
    assert (state.energy_j, state.temperature_c, state.most_sm_mhz) == (None, None, None)
    assert not [name for name in nvml.asked if "Set" in name or "Reset" in name]
    assert nvml.asked[-1] == "nvmlShutdown"


def test_watch_on_the_cpu_knows_nothing():
    with GpuWatch("cpu") as watch:
        pass
    assert watch.facts["energy_j"] is watch.facts["peak_memory_bytes"] is watch.facts["throttled"] is None


def test_watch_subtracts_the_energy(monkeypatch):
    states = iter(
        [GpuState(sm_mhz=1980, energy_j=100.0, throttled=()), GpuState(sm_mhz=1500, energy_j=130.5, throttled=("power cap",))]
    )
    monkeypatch.setattr(device, "read_gpu", lambda _device: next(states))
    calls = {"synchronize": lambda _d: None, "reset_peak_memory_stats": lambda _d: None, "max_memory_allocated": lambda _d: 77}
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**calls))
    with GpuWatch("cuda") as watch:
        pass
    assert watch.facts["energy_j"] == pytest.approx(30.5)
    assert watch.facts["sm_mhz"] == [1980, 1500]
    assert watch.facts["throttled"] == ["power cap"]
    assert watch.facts["peak_memory_bytes"] == 77


def test_watched_records_keep_order_and_content():
    found = list(watched(iter([{"name": "a"}, {"name": "b"}]), "cpu"))
    assert [r["name"] for r in found] == ["a", "b"]
    assert all("sm_mhz" in r["gpu_state"] for r in found)


@pytest.mark.gpu
def test_a_real_driver_answers():
    pytest.importorskip("pynvml")
    state = read_gpu("cuda")
    assert state.name == torch.cuda.get_device_name()
    assert state.sm_mhz
