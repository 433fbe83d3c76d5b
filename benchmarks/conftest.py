"""Benchmarks need a CUDA device and never fall back to a reference."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _strict_on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
