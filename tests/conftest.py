"""Settings of the test session: what is skipped on a machine without GPUs, and the number of threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests import golden

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if needed:
        import torch

        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found < needed:
            pytest.skip(f"needs {needed} CUDA device{'s' if needed > 1 else ''}, this machine has {found}")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def golden_device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test that takes this compares on the CPU and on a GPU, with the same tolerances."""
    with golden.on(request.param):
        yield request.param


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    import torch

    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, min(2, os.cpu_count() or 1) // workers))
