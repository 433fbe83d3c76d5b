"""Linear layer and GEGLU of a transformer's feed-forward block as one matrix product. Derivation and roofline: README.md."""

from __future__ import annotations

from torch import Tensor

from fvgen.kernels.linear_geglu.spec import linear_geglu_op


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``value * gelu(gate)`` of ``x @ weight.T + bias`` with the exact (erf) GELU; the ``2 C`` wide product never goes to memory.

    Args:
        x: ``[..., K]`` float32, bfloat16 or float16 (float64 on the slower path).
        weight: ``[2 C, K]``: first the rows of the value, then those of the gate.
        bias: ``[2 C]``. All three have one dtype and are differentiable.

    Returns:
        ``[..., C]`` in the dtype of x; computed in at least float32 and rounded once. In half precision the GPU version takes
        the GELU from a polynomial that is within 5e-6 of it before that rounding.

    Source: GLU variants (arXiv 2002.05202).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    if x.ndim == 0 or weight.ndim != 2 or weight.shape[0] % 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"x [..., K] and weight [2 C, K] are needed, got {list(x.shape)} and {list(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    if not x.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"x, weight and bias must have one dtype, got {x.dtype}, {weight.dtype} and {bias.dtype}")
    return linear_geglu_op(x.contiguous(), weight.contiguous(), bias.contiguous())
