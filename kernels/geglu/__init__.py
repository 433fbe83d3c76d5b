"""GEGLU of a transformer's feed-forward layer in one pass over memory. Derivation and roofline: README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from fvgen.kernels.geglu.spec import geglu_op


def geglu(x: Tensor) -> Tensor:
    """``value * gelu(gate)`` with the exact (erf) GELU; value is the first half of the last axis, gate the second.

    Args:
        x: ``[..., 2 C]`` float32, bfloat16 or float16 (float64 on the slower path); differentiable.

    Returns:
        ``[..., C]`` in the dtype of x; computed in at least float32 and rounded once.

    Source: GLU variants (arXiv 2002.05202).

    Raises:
        ValueError: the last axis is not even.
    """
    if x.ndim == 0 or x.shape[-1] % 2:
        raise ValueError(f"the last axis must hold value and gate: an even size, got shape {list(x.shape)}")
    return geglu_op(x.contiguous())
