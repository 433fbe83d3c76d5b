"""Hand-written records, and a model whose stages sleep."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fvgen.bench.model import BenchModel
from fvgen.bench.runner import Runners
from fvgen.cli import main
from fvgen.models.spec import ModelIndex

Run = Callable[..., tuple[int, str, str]]
ORIGIN = {
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
    "commit": "abc123",
    "command": "fvgen bench all --json RESULT.json",
    "date": "2026-01-02T03:04:05+00:00",
}


def timed(name: str, ms: float, **fields: Any) -> dict[str, Any]:
    """A record of a time."""
    spread = {"median_ms": ms, "p10_ms": 0.98 * ms, "p90_ms": 1.05 * ms, "min_ms": 0.97 * ms, "count": 30, "unit": "ms"}
    return {"name": name, **spread, **fields, **ORIGIN}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors here are so small that a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fvgen(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line; returns exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


class SleepingRunner:
    """A sampler of two steps that only takes its time: 2 ms to encode, 10 a step, the second none in fast mode, 5 to decode."""

    label, steps = "sleeper", 2
    graph_memory = 1000
    fast = False

    def __init__(self, _bundle: object) -> None:
        self.seeds: list[int] = []
        self.released = 0

    def encode(self, renders: Tensor) -> Tensor:
        time.sleep(0.002)
        return renders

    def encode_parts(self, _renders: Tensor) -> dict[str, Callable[[], Any]]:
        return {}

    def start(self, _condition: Tensor, seed: int) -> int:
        return seed

    def step(self, state: int, number: int, _condition: Tensor) -> int:
        if not (self.fast and number):
            time.sleep(0.010)
        return state + 1

    def forward(self, state: int, number: int, _condition: Tensor) -> int:
        time.sleep(0.008)
        return state

    def release(self) -> None:
        self.released += 1

    def decode(self, latents: int) -> Tensor:
        time.sleep(0.005)
        return torch.full((1,), latents)

    def clip(self, renders: Tensor, seed: int) -> Tensor:
        self.seeds.append(seed)
        state = self.start(self.encode(renders), seed)
        for number in range(self.steps):
            state = self.step(state, number, renders)
        return self.decode(state)


class SleepingTeacher:
    """4 ms a step."""

    label = "sleeper, DDIM"

    def __init__(self, _bundle: object, steps: int, scale: float) -> None:
        self.steps = steps
        assert scale == 7.5

    def clip(self, renders: Tensor, _seed: int, steps: int | None = None) -> Tensor:
        time.sleep(0.004 * (steps or self.steps))
        return renders

    def release(self) -> None:
        pass


SLEEPERS = Runners(SleepingRunner, SleepingTeacher)  # type: ignore[arg-type]


@pytest.fixture
def sleeper() -> BenchModel:
    index = ModelIndex("sleeper", height=64, width=96, frames=4, compositor="norm")
    return BenchModel("sleeper", index, "random weights", lambda _device: None)  # type: ignore[arg-type,return-value]
