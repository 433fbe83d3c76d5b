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


def launched() -> tuple[int, int, int] | None:
    """``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` as torchrun and accelerate set them; None for a process without a launcher."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    found = [os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ.get("LOCAL_RANK", os.environ["RANK"])]
    if not all(value.isdecimal() for value in found) or int(found[0]) >= int(found[1]):
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK do not fit: {', '.join(found)}")
    return int(found[0]), int(found[1]), int(found[2])


def repeatable_cublas() -> None:
    """Sets ``CUBLAS_WORKSPACE_CONFIG``, without which cuBLAS may add in another order from run to run; before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
