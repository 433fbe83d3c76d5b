"""Benchmarks never fall back to a reference on a GPU, and those that need one are skipped without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import pytest

Timed = Callable[..., None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, this machine has none")


@pytest.fixture(autouse=True)
def _strict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVGEN_KERNELS", "strict")


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def timed(benchmark: Any) -> Timed:
    """``timed(calls, device, rounds, **facts)`` times calls that do the same on buffers of their own, taken in turn."""

    def run(calls: Sequence[Callable[[], Any]], device: str, rounds: int = 20, **facts: Any) -> None:
        from fvgen.bench.timing import synchronize

        turn = cycle(calls)

        def call() -> None:
            next(turn)()
            synchronize(device)

        benchmark.extra_info.update(facts)
        benchmark.pedantic(call, warmup_rounds=2, rounds=rounds)

    return run
