"""Markers, and the folder of golden reference values (``FVGEN_GOLDEN``, default ``../shared/golden`` beside a checkout)."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> None:
    import torch

    torch.set_num_threads(min(2, os.cpu_count() or 1))
