"""Forward diffusion of clean latents with noise drawn in the kernel. Rules and roofline: README.md beside this file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fvgen.kernels.noise_injection.spec import noise_injection_op


class Injected(NamedTuple):
    """Noisy latents, and on request the noise and the velocity; all in the shape and dtype of the clean latents."""

    x_t: Tensor
    noise: Tensor | None
    velocity: Tensor | None


def noise_injection(
    x0: Tensor, t: Tensor, tables: Tensor, seed: int, offset: int = 0, *, want_noise: bool = False, want_velocity: bool = False
) -> Injected:
    """``x_t = a_t s_t x_0 + b_t eps`` and ``v = a_t eps - b_t s_t x_0`` with eps from Philox.

    Two calls with the same seed, offset and shape draw the same noise: so real and generated clips are noised alike.

    Args:
        x0: ``[B, ...]`` clean latents, float32, bfloat16 or float16 (float64 on the slower path); differentiable.
        t: ``[B]`` int64 time steps, on the same device.
        tables: ``[3, S]`` float32: a_t, b_t and the dynamic rescale s_t.
        seed: of the stream, 64 bits.
        offset: first counter; a draw uses B ceil(N / 4) counters, N being the elements of a sample.
        want_noise, want_velocity: also return eps and v.

    Sources: DDPM (arXiv 2006.11239, eq. 4), velocity (arXiv 2202.00512); dynamic rescale as in ViewCrafter's training.

    Raises:
        RuntimeError: shapes that do not fit together.
    """
    x_t, noise, velocity = noise_injection_op(x0.contiguous(), t, tables, seed, offset, want_noise, want_velocity)
    return Injected(x_t, noise if want_noise else None, velocity if want_velocity else None)
