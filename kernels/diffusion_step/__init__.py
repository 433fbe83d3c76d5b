"""One step of a sampler in one pass over the latents. Formulas, noise stream and roofline: README.md beside this file."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fvgen.kernels.diffusion_step.spec import student_step_op, teacher_step_op

__all__ = ["Stepped", "student_step", "teacher_step"]


class Stepped(NamedTuple):
    """Latents at the next time and the predicted clean latents, both in the shape and dtype of the present ones."""

    x_next: Tensor | None
    x0: Tensor | None


def student_step(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor | None, tables: Tensor, stream: Tensor) -> Stepped:
    """``x0 = (a x - b v) / s`` and, unless this is the last step, ``x_next = a' s' x0 + b' eps`` with eps from Philox.

    Args:
        x: ``[B, ...]`` noisy latents, float32, bfloat16 or float16 (float64 on the slower path).
        v: ``[B, ...]`` the student's velocity; may have another dtype. Nothing here is differentiated.
        t: ``[B]`` int64 time steps, on the same device.
        t_next: ``[B]`` int64 next time steps; None after the last one: x_next is None then.
        tables: ``[3, S]`` float32: a_t, b_t and the dynamic rescale s_t.
        stream: ``[2]`` int64, seed and offset of the noise, which is that of ``noise_injection``. A draw uses B ceil(N / 4)
            counters, N being the elements of a sample: add that to the offset for the next one.

    All numbers that change from step to step are tensors: a CUDA graph of one step replays with other values.

    Sources: velocity (arXiv 2202.00512); sampling by re-noising as in consistency models (arXiv 2303.01469, algorithm 1).

    Raises:
        RuntimeError: shapes that do not fit together.
    """
    x_next, x0 = student_step_op(x.detach().contiguous(), v.detach().contiguous(), t, t_next, tables, stream)
    return Stepped(None if t_next is None else x_next, x0)


def teacher_step(
    x: Tensor,
    v: Tensor,
    coefficients: Tensor,
    stream: Tensor,
    *,
    v_uncond: Tensor | None = None,
    guidance: float = 1.0,
    rescale: float = 0.0,
    noisy: bool = True,
    want_x0: bool = False,
) -> Stepped:
    """Guidance, ``x0 = (a x - b v) / s``, ``eps = a v + b x`` and ``x_next = signal x0 + direction eps + sigma noise``.

    Args:
        x: ``[B, ...]`` noisy latents, float32, bfloat16 or float16 (float64 on the slower path).
        v: ``[B, ...]`` conditional velocity; may have another dtype. Nothing here is differentiated.
        coefficients: ``[6]`` float32: a, b, s at the present time, then signal, direction and sigma of the step.
        stream: ``[2]`` int64, seed and offset of the noise; see :func:`student_step`.
        v_uncond: ``[B, ...]`` unconditional velocity in the dtype of v; without it there is neither guidance nor rescale.
        guidance: ``v_uncond + guidance (v - v_uncond)``, so 1 is no guidance.
        rescale: 0 .. 1, how far the guided velocity's standard deviation per sample is pulled back to the conditional one's.
        noisy: False leaves the noise out, for sigma = 0 at every step (eta = 0).
        want_x0: also return the clean latents.

    Sources: DDIM (arXiv 2010.02502, eq. 12), guidance (arXiv 2207.12598), rescale (arXiv 2305.08891, eq. 15).

    Raises:
        RuntimeError: shapes that do not fit together.
    """
    uncond = None if v_uncond is None else v_uncond.detach().contiguous()
    tensors = (x.detach().contiguous(), v.detach().contiguous(), uncond, coefficients, stream)
    x_next, x0 = teacher_step_op(*tensors, guidance, rescale, noisy, want_x0)
    return Stepped(x_next, x0 if want_x0 else None)
