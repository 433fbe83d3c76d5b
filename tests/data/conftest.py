"""The tensors here are so small that a second thread costs more than it gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.cli.conftest import checkpoint, converted, fvgen, model  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
