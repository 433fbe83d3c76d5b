"""Operator descriptions of the sampler steps. They have no backward pass: samplers run without gradients."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.diffusion_step import reference


def _random(device: str, dtype: torch.dtype, number: int, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    return torch.randn((number, *shape), generator=random).to(device, dtype).unbind(0)


def _student(
    device: str, dtype: torch.dtype, *, shape: tuple[int, ...], last: bool = False, half: bool = False, offset: int = 0
) -> tuple:
    x, v = _random(device, dtype, 2, shape)
    random = torch.Generator().manual_seed(1)
    t, t_next = torch.randint(0, 100, (2, shape[0]), generator=random).to(device).unbind(0)
    tables = (0.2 + 0.8 * torch.rand(3, 100, generator=random)).to(device)
    stream = torch.tensor([2024, offset], device=device)
    return x, v.half() if half else v, t, None if last else t_next, tables, stream


def _teacher(
    device: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...],
    guided: bool = True,
    rescale: float = 0.7,
    noisy: bool = True,
    want_x0: bool = True,
    mean: float = 0.0,
) -> tuple:
    x, cond, uncond = _random(device, dtype, 3, shape)
    coefficients = torch.tensor([0.6, 0.8, 0.7, 0.5, 0.4, 0.3], device=device)
    stream = torch.tensor([2024, 2**33 + 5], device=device)
    return x, cond + mean, uncond + mean if guided else None, coefficients, stream, 7.5, rescale, noisy, want_x0


def _student_fake(
    x: Tensor, v: Tensor, t: Tensor, t_next: Tensor | None, tables: Tensor, stream: Tensor
) -> tuple[Tensor, Tensor]:
    torch._check(x.ndim >= 2 and v.shape == x.shape, lambda: "x must have shape [B, ...] and v the same")
    torch._check(t.shape == x.shape[:1] and (t_next is None or t_next.shape == t.shape), lambda: "t, t_next must have shape [B]")
    torch._check(tables.ndim == 2 and tables.shape[0] == 3, lambda: "tables must have shape [3, S]: a_t, b_t, s_t")
    torch._check(stream.shape == (2,), lambda: "stream must have shape [2]: seed and offset")
    return x.new_empty(0) if t_next is None else torch.empty_like(x), torch.empty_like(x)


def _teacher_fake(
    x: Tensor, cond: Tensor, uncond: Tensor | None, coefficients: Tensor, stream: Tensor, *rest: float
) -> tuple[Tensor, Tensor]:
    torch._check(x.ndim >= 2 and cond.shape == x.shape, lambda: "x must have shape [B, ...] and the velocities the same")
    torch._check(uncond is None or uncond.shape == x.shape, lambda: "v_uncond must have the shape of x")
    torch._check(coefficients.shape == (6,) and stream.shape == (2,), lambda: "coefficients must have shape [6], stream [2]")
    return torch.empty_like(x), torch.empty_like(x) if rest[-1] else x.new_empty(0)


def _student_supports(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor | None, tables: Tensor, stream: Tensor) -> str | None:
    if v.shape != x.shape or t.shape != x.shape[:1] or (t_next is not None and t_next.shape != t.shape):
        return "shapes that do not fit together"
    times = (t, stream) if t_next is None else (t, t_next, stream)
    return unsupported(x, v) or unsupported(tables, dtypes=(torch.float32,)) or unsupported(*times, dtypes=(torch.int64,))


def _teacher_supports(
    x: Tensor, cond: Tensor, uncond: Tensor | None, coefficients: Tensor, stream: Tensor, *_: float
) -> str | None:
    latents = (x, cond) if uncond is None else (x, cond, uncond)
    if any(y.shape != x.shape for y in latents) or coefficients.shape != (6,):
        return "shapes that do not fit together"
    floats = unsupported(coefficients, dtypes=(torch.float32,))
    return unsupported(*latents) or floats or unsupported(stream, dtypes=(torch.int64,))


def _student_cost(x: Tensor, v: Tensor, t: Tensor, t_next: Tensor | None, *_: Tensor) -> Cost:
    written = 1 if t_next is None else 2
    moved = x.numel() * ((1 + written) * x.element_size() + v.element_size())
    return Cost(bytes=moved, flops=(4 if t_next is None else 66) * x.numel())


def _teacher_cost(x: Tensor, cond: Tensor, uncond: Tensor | None, coefficients: Tensor, stream: Tensor, *rest: float) -> Cost:
    _, rescale, noisy, want_x0 = rest
    velocities = (1 if uncond is None else 4 if rescale else 2) * cond.element_size()
    return Cost(bytes=x.numel() * ((2 + want_x0) * x.element_size() + velocities), flops=(30 + 60 * noisy) * x.numel())  # type: ignore[arg-type]


_CLIPS = {"16x320x512": (1, 4, 16, 40, 64), "25x576x1024": (1, 4, 25, 72, 128)}
_POINTERS = dict.fromkeys(("x_ptr", "v_ptr", "cond_ptr", "uncond_ptr", "next_ptr", "x0_ptr"), "*bf16")
_TABLES = {**dict.fromkeys(("tables_ptr", "coefficients_ptr", "spread_ptr"), "*fp32"), "t_ptr": "*i64", "t_next_ptr": "*i64"}
_SCALARS = {"guidance": "fp32", "rescale": "fp32", "count": "i32", "quads": "i32", "programs": "i32", "steps": "i32"}
_TYPES = {**_POINTERS, **_TABLES, **_SCALARS, "stream_ptr": "*i64"}


def _kernel(name: str, arguments: str, constants: dict) -> TritonKernel:
    return TritonKernel("diffusion_step.triton", name, {n: _TYPES[n] for n in arguments.split()}, {**constants, "BLOCK": 1024})


STUDENT = OpSpec(
    name="student_step",
    schema="(Tensor x, Tensor v, Tensor t, Tensor? t_next, Tensor tables, Tensor stream) -> (Tensor, Tensor)",
    reference=reference.student_step,
    fake=_student_fake,
    fast=launcher("diffusion_step.triton", "student_step"),
    available=unavailable,
    supports=_student_supports,
    cases=(
        Case("small", partial(_student, shape=(2, 3, 5))),
        Case("last", partial(_student, shape=(3, 7), last=True)),
        Case("odd", partial(_student, shape=(3, 4, 5, 7, 9), offset=2**33 + 5)),
        Case("across_programs", partial(_student, shape=(2, 1030))),
        Case("half_velocity", partial(_student, shape=(1, 9), half=True)),
        Case("empty", partial(_student, shape=(0, 4, 2))),
    ),
    benchmarks=tuple(Case(name, partial(_student, shape=shape)) for name, shape in _CLIPS.items()),
    tolerance=Tolerance(forward=2e-6),
    cost=_student_cost,
    baselines={"eager": reference.student_step, "randn": partial(reference.student_step, draw=reference.randn)},
    kernels=(
        _kernel(
            "student_step_kernel",
            "x_ptr v_ptr t_ptr t_next_ptr tables_ptr stream_ptr next_ptr x0_ptr count quads steps",
            {"LAST": False},
        ),
    ),
)
TEACHER = OpSpec(
    name="teacher_step",
    schema="(Tensor x, Tensor cond, Tensor? uncond, Tensor coefficients, Tensor stream, float guidance, float rescale,"
    " bool noisy, bool want_x0) -> (Tensor, Tensor)",
    reference=reference.teacher_step,
    fake=_teacher_fake,
    fast=launcher("diffusion_step.triton", "teacher_step"),
    available=unavailable,
    supports=_teacher_supports,
    cases=(
        Case("small", partial(_teacher, shape=(2, 3, 5))),
        Case("unguided", partial(_teacher, shape=(3, 7, 11), guided=False)),
        Case("deterministic", partial(_teacher, shape=(3, 50), rescale=0.0, noisy=False, want_x0=False)),
        Case("across_programs", partial(_teacher, shape=(2, 4, 1031))),
        Case("far_from_zero", partial(_teacher, shape=(2, 2100), mean=30.0)),
        Case("empty", partial(_teacher, shape=(0, 4, 2), rescale=0.0)),
    ),
    benchmarks=tuple(Case(name, partial(_teacher, shape=shape, want_x0=False)) for name, shape in _CLIPS.items()),
    tolerance=Tolerance(forward=5e-6),
    cost=_teacher_cost,
    baselines={"eager": reference.teacher_step, "randn": partial(reference.teacher_step, draw=reference.randn)},
    kernels=(
        _kernel("guidance_spread_kernel", "cond_ptr uncond_ptr spread_ptr guidance count programs", {"SUMS": 4}),
        _kernel(
            "teacher_step_kernel",
            "x_ptr cond_ptr uncond_ptr coefficients_ptr stream_ptr spread_ptr next_ptr x0_ptr guidance rescale count quads"
            " programs",
            {"GUIDED": True, "RESCALED": True, "NOISY": True, "WANT_X0": True, "SUMS": 4, "BLOCK_P": 128},
        ),
    ),
)

student_step_op = build_op(STUDENT)
teacher_step_op = build_op(TEACHER)
SPECS = (STUDENT, TEACHER)
