"""The only place that reads environment variables; the table of them is in docs/environment.md."""

from __future__ import annotations

import os


def kernels_mode() -> str:
    """``FVGEN_KERNELS``: auto (fast path, falling back with one logged reason), reference, or strict (never fall back)."""
    mode = os.environ.get("FVGEN_KERNELS", "auto")
    if mode not in ("auto", "reference", "strict"):
        raise ValueError(f"FVGEN_KERNELS must be auto, reference or strict, not {mode!r}")
    return mode


def process() -> tuple[int, int, int]:
    """``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK`` as torchrun and accelerate set them; (0, 1, 0) for a lone process."""
    found = [os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_RANK", "0")]
    if not all(value.isdecimal() for value in found) or int(found[0]) >= int(found[1]):
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK do not fit: {', '.join(found)}")
    return int(found[0]), int(found[1]), int(found[2])


def commit() -> str | None:
    """``FVGEN_COMMIT``: commit to write into results where the checkout has no git history."""
    return os.environ.get("FVGEN_COMMIT") or None


def launched_ranks() -> tuple[int, int, int] | None:
    """``RANK``, ``LOCAL_RANK`` and ``WORLD_SIZE`` of a launcher such as torchrun; None without one."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None or world is None:
        return None
    return int(rank), int(os.environ.get("LOCAL_RANK", rank)), int(world)


def repeatable_cublas() -> None:
    """Sets ``CUBLAS_WORKSPACE_CONFIG``, without which cuBLAS may add in another order from run to run; before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
