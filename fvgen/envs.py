"""The only place that reads environment variables; the table of them is in docs/environment.md."""

from __future__ import annotations

import os


def kernels_mode() -> str:
    """``FVGEN_KERNELS``: auto (fast path, falling back with one logged reason), reference, or strict (never fall back)."""
    mode = os.environ.get("FVGEN_KERNELS", "auto")
    if mode not in ("auto", "reference", "strict"):
        raise ValueError(f"FVGEN_KERNELS must be auto, reference or strict, not {mode!r}")
    return mode


def build_cuda() -> str:
    """``FVGEN_BUILD_CUDA``: auto, 1 or 0."""
    return os.environ.get("FVGEN_BUILD_CUDA", "auto")


def golden_dir() -> str | None:
    """``FVGEN_GOLDEN``: folder with golden reference values for the tests."""
    return os.environ.get("FVGEN_GOLDEN")
