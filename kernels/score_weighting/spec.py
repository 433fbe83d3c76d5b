"""Operator description of the score weighting. It has no backward pass: the gradient it makes is a constant of the loss."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, launcher, unavailable, unsupported
from fvgen.kernels.score_weighting import reference


def _inputs(
    device: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...],
    guided: bool = True,
    rescale: float = 0.7,
    divergence: str = "softened_rkl",
) -> tuple:
    random = torch.Generator().manual_seed(0)
    x0, x_tau, cond, uncond, fake = torch.randn((5, *shape), generator=random, dtype=torch.float64).to(device, dtype).unbind(0)
    logits = 2 * torch.randn(shape[0], generator=random)
    tau = torch.randint(0, 100, shape[:1], generator=random)
    tables = 0.2 + 0.8 * torch.rand(3, 100, generator=random)
    uncond = uncond if guided else cond.new_empty(0)
    return x0, x_tau, cond, uncond, fake, logits.to(device), tau.to(device), tables.to(device), 7.5, rescale, divergence, 5.0


def _fake(x0: Tensor, x_tau: Tensor, v_real: Tensor, v_uncond: Tensor, v_fake: Tensor, logits: Tensor, *_: object) -> tuple:
    torch._check(x_tau.shape == x0.shape, lambda: "x_tau must have the shape of x0 [B, ...]")
    torch._check(v_real.shape == x0.shape and v_fake.shape == x0.shape, lambda: "v_real, v_fake must have the shape of x0")
    torch._check(logits.shape == x0.shape[:1], lambda: "logits must have shape [B]")
    statistics = x0.new_empty((x0.shape[0], 4), dtype=torch.promote_types(x0.dtype, torch.float32))
    return torch.empty_like(x0), statistics


def _supports(x0: Tensor, x_tau: Tensor, v_real: Tensor, v_uncond: Tensor, v_fake: Tensor, *rest: object) -> str | None:
    logits, _, tables, *_ = rest
    return unsupported(x0, x_tau, v_real, v_uncond, v_fake) or unsupported(logits, tables, dtypes=(torch.float32,))  # type: ignore[arg-type]


def _cost(x0: Tensor, x_tau: Tensor, v_real: Tensor, v_uncond: Tensor, v_fake: Tensor, *_: object) -> Cost:
    guided = v_uncond.numel() > 0
    # first pass: x0, x_tau, velocities; second pass: velocities again and the gradient
    return Cost(bytes=x0.numel() * x0.element_size() * (4 + guided + 2 + guided + 1), flops=30 * x0.numel())


_POINTERS = dict.fromkeys(("x0_ptr", "x_tau_ptr", "cond_ptr", "uncond_ptr", "fake_ptr", "out_ptr"), "*bf16")
_FLOATS = dict.fromkeys(("logits_ptr", "tables_ptr", "spread_ptr", "sums_ptr", "statistics_ptr"), "*fp32")
_SCALARS = dict.fromkeys(("guidance", "rescale", "clip", "epsilon"), "fp32")
_TYPES = {**_POINTERS, **_FLOATS, **_SCALARS, "tau_ptr": "*i64", "count": "i32", "programs": "i32", "steps": "i32"}
_COMMON = {"GUIDED": True, "SUMS": 4, "BLOCK": 2048}
_TOTALS = {**_COMMON, "RESCALED": True, "BLOCK_P": 128}


def _kernel(name: str, arguments: str, constants: dict) -> TritonKernel:
    return TritonKernel("score_weighting.triton", name, {n: _TYPES[n] for n in arguments.split()}, constants)


SPEC = OpSpec(
    name="score_weighting",
    schema="(Tensor x0, Tensor x_tau, Tensor v_real, Tensor v_uncond, Tensor v_fake, Tensor logits, Tensor tau, Tensor tables,"
    " float guidance, float rescale, str divergence, float clip) -> (Tensor, Tensor)",
    reference=reference.score_weighting,
    fake=_fake,
    fast=launcher("score_weighting.triton", "score_weighting"),
    available=unavailable,
    supports=_supports,
    cases=(
        Case("small", partial(_inputs, shape=(2, 3, 5))),
        Case("unguided", partial(_inputs, shape=(3, 7, 11), guided=False, divergence="jensen_shannon")),
        Case("no_rescale", partial(_inputs, shape=(3, 50), rescale=0.0, divergence="reverse_kl")),
        Case("across_programs", partial(_inputs, shape=(2, 4, 2053), divergence="forward_kl")),
        Case("one_element", partial(_inputs, shape=(3, 1), rescale=0.0)),
        Case("neyman", partial(_inputs, shape=(5, 3, 3), divergence="neyman")),
    ),
    benchmarks=(
        Case("16x320x512", partial(_inputs, shape=(8, 4, 16, 40, 64))),
        Case("25x576x1024", partial(_inputs, shape=(4, 4, 25, 72, 128))),
    ),
    tolerance=Tolerance(forward=2e-5),
    cost=_cost,
    baselines={"eager": reference.score_weighting},
    kernels=(
        _kernel("guidance_spread_kernel", "cond_ptr uncond_ptr spread_ptr guidance count programs", {"SUMS": 4, "BLOCK": 2048}),
        _kernel(
            "distance_kernel",
            "x0_ptr x_tau_ptr cond_ptr uncond_ptr fake_ptr tau_ptr tables_ptr spread_ptr sums_ptr guidance rescale count programs"
            " steps",
            _TOTALS,
        ),
        _kernel(
            "gradient_kernel",
            "cond_ptr uncond_ptr fake_ptr logits_ptr tau_ptr tables_ptr spread_ptr sums_ptr out_ptr statistics_ptr guidance"
            " rescale clip count programs steps epsilon",
            {**_TOTALS, "DIVERGENCE": 1},
        ),
    ),
)

score_weighting_op = build_op(SPEC)
SPECS = (SPEC,)
