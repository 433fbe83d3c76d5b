"""What the GPU does during a measurement, read through NVML: clocks, throttling, power, energy. Nothing is ever set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

THROTTLE = {
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}  # bit 0x1 is an idle GPU


@dataclass(frozen=True)
class GpuState:
    """One reading; None where driver or package do not tell.

    Attributes:
        name, driver: of the GPU.
        sm_mhz, memory_mhz, most_sm_mhz: clocks now and the highest the GPU has.
        throttled: why the clocks are held down, empty if they are not.
        power_w, temperature_c: now.
        energy_j: counter since the driver was loaded.
    """

    name: str | None = None
    driver: str | None = None
    sm_mhz: int | None = None
    memory_mhz: int | None = None
    most_sm_mhz: int | None = None
    throttled: tuple[str, ...] | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    energy_j: float | None = None


def read_gpu(device: str = "cuda") -> GpuState:
    """The state of a CUDA device; a state of None for the CPU and where NVML is not available."""
    if not device.startswith("cuda"):
        return GpuState()
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, or a library that does not fit the driver
        return GpuState()
    try:
        return _read(pynvml, _handle(pynvml, device))
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: Any, device: str) -> Any:
    """NVML counts all GPUs, PyTorch those of CUDA_VISIBLE_DEVICES: the identifier is common to both."""
    index = int(device.partition(":")[2] or 0)
    try:
        import torch

        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
        return nvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:
        try:
            return nvml.nvmlDeviceGetHandleByIndex(index)
        except Exception:
            return None


def _read(nvml: Any, handle: Any) -> GpuState:
    def ask(question: str, constant: str | None = None) -> Any:
        try:
            return getattr(nvml, question)(handle, *([] if constant is None else [getattr(nvml, constant)]))
        except Exception:  # a question that this package, GPU or driver does not know
            return None

    def scaled(value: float | None, factor: float) -> float | None:
        return None if value is None else value * factor

    try:
        driver = _text(nvml.nvmlSystemGetDriverVersion())
    except Exception:
        driver = None
    if handle is None:
        return GpuState(driver=driver)
    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:
        reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")  # its older name
    return GpuState(
        name=_text(ask("nvmlDeviceGetName")),
        driver=driver,
        sm_mhz=ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
        memory_mhz=ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_MEM"),
        most_sm_mhz=ask("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"),
        throttled=None if reasons is None else tuple(text for bit, text in THROTTLE.items() if reasons & bit),
        power_w=scaled(ask("nvmlDeviceGetPowerUsage"), 1e-3),
        temperature_c=ask("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
        energy_j=scaled(ask("nvmlDeviceGetTotalEnergyConsumption"), 1e-3),
    )


def _text(value: Any) -> str | None:
    return value.decode() if isinstance(value, bytes) else value


class GpuWatch:
    """State before and after a block, energy of the block and its peak memory, for a record: ``with GpuWatch(d) as watch``."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> GpuWatch:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        self._before = read_gpu(self.device)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        peak = None
        if self.device.startswith("cuda"):
            import torch

            if kind is None:
                torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device)
        before, after = self._before, read_gpu(self.device)
        known = before.throttled is not None and after.throttled is not None
        counted = before.energy_j is not None and after.energy_j is not None
        self.facts = {
            "sm_mhz": [before.sm_mhz, after.sm_mhz],
            "most_sm_mhz": after.most_sm_mhz,
            "memory_mhz": [before.memory_mhz, after.memory_mhz],
            "throttled": sorted({*(before.throttled or ()), *(after.throttled or ())}) if known else None,
            "power_w": after.power_w,
            "temperature_c": after.temperature_c,
            "energy_j": after.energy_j - before.energy_j if counted else None,  # type: ignore[operator]
            "peak_memory_bytes": peak,
        }


def watched(records: Iterator[dict[str, Any]], device: str) -> Iterator[dict[str, Any]]:
    """The records with ``gpu_state``: what the GPU did from the beginning of each measurement to its end, unless they say it."""
    while True:
        with GpuWatch(device) as watch:
            record = next(records, None)
        if record is None:
            return
        yield {"gpu_state": {k: v for k, v in watch.facts.items() if k != "peak_memory_bytes"}, **record}
