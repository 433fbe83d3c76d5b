"""Which path an operator takes for CUDA tensors, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fvgen import envs
from fvgen.kernels._spec import OpSpec

_log = logging.getLogger("fvgen.kernels")
_told: set[tuple[str, str]] = set()


def _machine_reason(spec: OpSpec) -> str | None:
    return "no GPU version exists" if spec.fast is None else spec.available()


def choose(spec: OpSpec, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function to run for these CUDA arguments.

    Raises:
        RuntimeError: ``FVGEN_KERNELS=strict`` and the fast path does not apply.
    """
    mode = envs.kernels_mode()
    if mode == "reference":
        return spec.reference
    reason = _machine_reason(spec) or spec.supports(*args)
    if reason is None:
        assert spec.fast is not None
        return spec.fast
    if mode == "strict":
        raise RuntimeError(f"fvgen::{spec.name}: no fast path ({reason}); FVGEN_KERNELS=auto allows the slower reference")
    if (spec.name, reason) not in _told:
        _told.add((spec.name, reason))
        _log.warning("fvgen::%s runs its PyTorch reference: %s", spec.name, reason)
    return spec.reference


def machine_path(spec: OpSpec) -> tuple[str, str]:
    """``(path, reason)`` for arguments that the fast path supports."""
    import torch

    if envs.kernels_mode() == "reference":
        return "reference", "FVGEN_KERNELS=reference"
    if not torch.cuda.is_available():
        return "reference", "no CUDA device"
    reason = _machine_reason(spec)
    return ("fast", "available") if reason is None else ("reference", reason)
