"""The only place that reads environment variables; the table of them is in docs/environment.md."""

from __future__ import annotations

import os


def kernels_mode() -> str:
    """``FVGEN_KERNELS``: auto (fast path, falling back with one logged reason), reference, or strict (never fall back)."""
    mode = os.environ.get("FVGEN_KERNELS", "auto")
    if mode not in ("auto", "reference", "strict"):
        raise ValueError(f"FVGEN_KERNELS must be auto, reference or strict, not {mode!r}")
    return mode


def commit() -> str | None:
    """``FVGEN_COMMIT``: commit to write into results where the checkout has no git history."""
    return os.environ.get("FVGEN_COMMIT") or None
