"""Kernels that are compiled ahead of their launch."""

from __future__ import annotations

import pytest
import torch

from fvgen.kernels._triton import compile_side_by_side, unavailable


def test_nothing_happens_where_kernels_cannot_run():
    if unavailable() is None:
        pytest.skip("kernels run on this machine")
    called = []
    compile_side_by_side(lambda: called.append(1))
    assert called == []


@pytest.mark.gpu
def test_kernels_are_compiled_but_do_not_run(monkeypatch):
    from triton.runtime.jit import JITFunction

    from fvgen.kernels.geglu import geglu
    from fvgen.kernels.geglu.triton import geglu_kernel

    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    run = JITFunction.run
    x = torch.randn(33, 2 * 48, device="cuda", dtype=torch.float16)
    geglu_kernel.device_caches.clear()
    compile_side_by_side(lambda: geglu(x))
    assert JITFunction.run is run
    cache = geglu_kernel.device_caches[torch.cuda.current_device()][0]
    assert len(cache) == 1
    value, gate = x.float().chunk(2, -1)
    expected = value * torch.nn.functional.gelu(gate)
    torch.testing.assert_close(geglu(x).float(), expected, rtol=2e-3, atol=2e-3)
    assert len(cache) == 1, "the launch compiled again"
