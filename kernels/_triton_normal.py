"""Normal numbers inside Triton kernels: the stream of ``_philox.normal``, without the slow paths of the library's sine."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sin_cos_turns(u):
    """sin and cos of 2 pi u for u in [0, 1], by octants and Taylor series (error below 3e-8 before rounding)."""
    k = (4.0 * u + 0.5).to(tl.int32)
    x = 6.283185307179586 * (u - 0.25 * k.to(tl.float32))
    y = x * x
    s = x * (1.0 + y * (-1.6666667e-1 + y * (8.3333333e-3 + y * (-1.9841270e-4 + y * 2.7557319e-6))))
    c = 1.0 + y * (-0.5 + y * (4.1666667e-2 + y * (-1.3888889e-3 + y * (2.4801587e-5 + y * -2.7557319e-7))))
    odd = (k & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((k & 2) != 0, -sine, sine)
    cosine = tl.where(((k + 1) & 2) != 0, -cosine, cosine)
    return sine, cosine


@triton.jit
def _box_muller(u1, u2):
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u1, 1.0e-7)))
    sine, cosine = _sin_cos_turns(u2)
    return radius * cosine, radius * sine


@triton.jit
def normal_block(seed, counter):
    """Standard normal numbers for int64 counters ``[N]``, ``[4 N]``: four consecutive numbers per counter."""
    u0, u1, u2, u3 = tl.rand4x(seed, counter)
    n0, n1 = _box_muller(u0, u1)
    n2, n3 = _box_muller(u2, u3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
