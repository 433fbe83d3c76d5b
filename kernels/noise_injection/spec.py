"""Operator descriptions of the noise injection and its backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.noise_injection import reference


def _inputs(
    device: str, dtype: torch.dtype, *, shape: tuple[int, ...], noise: bool = True, velocity: bool = True, offset: int = 0
) -> tuple:
    random = torch.Generator().manual_seed(0)
    x0 = torch.randn(shape, generator=random, dtype=torch.float64).to(device, dtype)
    t = torch.randint(0, 100, shape[:1], generator=random).to(device)
    return x0, t, torch.rand(3, 100, generator=random).to(device), 2024, offset, noise, velocity


def _gradients(device: str, dtype: torch.dtype, *, shape: tuple[int, ...], velocity: bool = True) -> tuple:
    x0, t, tables, *_ = _inputs(device, dtype, shape=shape)
    return x0, x0.flip(0) if velocity else x0.new_empty(0), t, tables


def _fake(x0: Tensor, t: Tensor, tables: Tensor, seed: int, offset: int, want_noise: bool, want_velocity: bool) -> tuple:
    torch._check(x0.ndim >= 2 and t.shape == x0.shape[:1], lambda: "x0 must have shape [B, ...] and t shape [B]")
    torch._check(tables.ndim == 2 and tables.shape[0] == 3, lambda: "tables must have shape [3, S]: a_t, b_t, s_t")
    return tuple(x0.new_empty(x0.shape if wanted else (0,)) for wanted in (True, want_noise, want_velocity))


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.want_velocity = inputs[6]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor, grad_velocity: Tensor) -> tuple:
    velocity = grad_velocity.contiguous() if ctx.want_velocity else grad.new_empty(0)
    return noise_injection_backward_op(grad.contiguous(), velocity, *ctx.saved_tensors), *[None] * 6


def _cost(x0: Tensor, t: Tensor, tables: Tensor, seed: int, offset: int, want_noise: bool, want_velocity: bool) -> Cost:
    return Cost(bytes=x0.numel() * x0.element_size() * (2 + want_noise + want_velocity), flops=60 * x0.numel())


def _backward_cost(grad: Tensor, grad_velocity: Tensor, t: Tensor, tables: Tensor) -> Cost:
    return Cost(bytes=(2 * grad.numel() + grad_velocity.numel()) * grad.element_size(), flops=4 * grad.numel())


_CLIPS = {"16x320x512": (8, 4, 16, 40, 64), "25x576x1024": (4, 4, 25, 72, 128)}
_SIZES = {"count": "i64", "steps": "i32"}
FORWARD = OpSpec(
    name="noise_injection",
    schema="(Tensor x0, Tensor t, Tensor tables, int seed, int offset, bool want_noise, bool want_velocity)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.noise_injection,
    fake=_fake,
    fast=launcher("noise_injection.triton", "noise_injection"),
    available=unavailable,
    supports=lambda x0, t, tables, *_: unsupported(x0) or unsupported(tables, dtypes=(torch.float32,)),
    setup_context=_context,
    backward=_backward,
    grad_args=(0,),
    cases=(
        Case("small", partial(_inputs, shape=(2, 3, 5)), gradcheck=True),
        Case("without_velocity", partial(_inputs, shape=(3, 7), velocity=False), gradcheck=True),
        Case("alone", partial(_inputs, shape=(1, 1), noise=False, velocity=False), gradcheck=True),
        Case("odd", partial(_inputs, shape=(3, 4, 5, 7, 9), offset=2**33 + 5)),
        Case("across_programs", partial(_inputs, shape=(2, 1030))),
        Case("empty", partial(_inputs, shape=(0, 4, 2))),
    ),
    benchmarks=tuple(Case(name, partial(_inputs, shape=shape)) for name, shape in _CLIPS.items()),
    tolerance=Tolerance(forward=2e-6, backward=1e-6),
    cost=_cost,
    baselines={"eager": reference.noise_injection, "randn": reference.randn},
    kernels=(
        TritonKernel(
            "noise_injection.triton",
            "noise_injection_kernel",
            {
                **dict.fromkeys(("x_ptr", "out_ptr", "noise_ptr", "velocity_ptr"), "*bf16"),
                **{"t_ptr": "*i64", "tables_ptr": "*fp32", "seed": "i64", "offset": "i64", "quads": "i64"},
                **_SIZES,
            },
            {"WANT_NOISE": True, "WANT_VELOCITY": True, "BLOCK": 1024},
        ),
    ),
)
BACKWARD = OpSpec(
    name="noise_injection_backward",
    schema="(Tensor grad, Tensor grad_velocity, Tensor t, Tensor tables) -> Tensor",
    reference=reference.noise_injection_backward,
    fake=lambda grad, grad_velocity, t, tables: torch.empty_like(grad),
    fast=launcher("noise_injection.triton", "noise_injection_backward"),
    available=unavailable,
    supports=lambda g, gv, t, tables: unsupported(g, gv) or unsupported(tables, dtypes=(torch.float32,)),
    cases=(
        Case("small", partial(_gradients, shape=(2, 3, 5))),
        Case("without_velocity", partial(_gradients, shape=(3, 1031), velocity=False)),
        Case("empty", partial(_gradients, shape=(0, 4))),
    ),
    benchmarks=tuple(Case(name, partial(_gradients, shape=shape)) for name, shape in _CLIPS.items()),
    tolerance=Tolerance(forward=1e-6),
    cost=_backward_cost,
    baselines={"eager": reference.noise_injection_backward},
    kernels=(
        TritonKernel(
            "noise_injection.triton",
            "noise_injection_backward_kernel",
            {
                **dict.fromkeys(("grad_ptr", "grad_velocity_ptr", "out_ptr"), "*bf16"),
                **{"t_ptr": "*i64", "tables_ptr": "*fp32"},
                **_SIZES,
            },
            {"HAS_VELOCITY": True, "BLOCK": 1024},
        ),
    ),
)

noise_injection_backward_op = build_op(BACKWARD)
noise_injection_op = build_op(FORWARD)
SPECS = (FORWARD, BACKWARD)
