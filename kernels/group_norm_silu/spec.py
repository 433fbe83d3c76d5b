"""Operator descriptions of the group normalisation and its backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fvgen.kernels._library import build_op
from fvgen.kernels._spec import Case, Cost, OpSpec, Tolerance
from fvgen.kernels._triton import TritonKernel, column_sums_kernel, launcher, unavailable, unsupported
from fvgen.kernels.group_norm_silu import reference


def _inputs(
    device: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int],
    groups: int,
    emb: int = 2,
    residual: bool = False,
    silu: bool = True,
) -> tuple:
    """Arguments of the forward operator; ``emb`` is the number of dimensions of the embedding, 0 for none."""
    random = torch.Generator().manual_seed(0)
    n, _, channels = shape
    shapes = (shape, (channels,), (channels,), (n, channels)[2 - emb :], shape if residual else (0,))
    draws = (torch.randn(s, generator=random, dtype=torch.float64) for s in shapes)
    x, weight, bias, added, other = (draw.to(device, dtype) for draw in draws)
    added = added if emb else x.new_empty(0)
    return 2 * x + 0.5, other, 1 + 0.3 * weight, 0.3 * bias, added, groups, 1e-5, silu


def _given(device: str, dtype: torch.dtype, *, shape: tuple[int, int, int], groups: int, silu: bool = True) -> tuple:
    """Arguments with statistics made by hand: in float32, as a product's accumulators would leave them."""
    x, _, weight, bias, _, _, eps, _ = _inputs(device, dtype, shape=shape, groups=groups)
    exact = torch.promote_types(dtype, torch.float32)
    blocks = [block.to(exact) for block in x.split(reference.ROWS, dim=1)]
    rows = [torch.stack([b.mean(1), (b - b.mean(1, keepdim=True)).square().sum(1)], dim=1) for b in blocks]
    return x, torch.stack(rows, dim=1), weight, bias, groups, eps, silu


def _beside(
    device: str,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int],
    further: int,
    emb: int = 0,
    residual: bool = True,
    groups: int,
) -> tuple:
    """Arguments with ``further`` channels of a skip connection."""
    wide = (*shape[:2], shape[2] + further)
    _, _, weight, bias, _, *rest = _inputs(device, dtype, shape=wide, groups=groups)
    skip = _inputs(device, dtype, shape=(*shape[:2], further), groups=1)[0].flip(1).contiguous()
    x, other, _, _, added, *_ = _inputs(device, dtype, shape=shape, groups=1, emb=emb, residual=residual)
    return x, other, skip, weight, bias, added, *rest


def _gradients(device: str, dtype: torch.dtype, **shape: Any) -> tuple:
    x, residual, weight, bias, emb, groups, eps, silu = _inputs(device, dtype, **shape)
    _, total, mean, rstd = reference.group_norm_silu(x, residual, weight, bias, emb, groups, eps, silu)
    return x.flip(1).contiguous(), residual, total if residual.numel() else x, weight, bias, emb, mean, rstd, groups, silu


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, ...]:
    torch._check(x.ndim == 3, lambda: "x must have shape [N, R, C]")
    torch._check(x.shape[2] % groups == 0, lambda: "groups must divide the channels of x [N, R, C]")
    torch._check(weight.shape == x.shape[2:] and bias.shape == x.shape[2:], lambda: "weight and bias must have shape [C]")
    statistics = x.new_empty((x.shape[0], groups), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), torch.empty_like(residual), statistics, torch.empty_like(statistics)


def _fake_backward(
    grad: Tensor, grad_total: Tensor, x: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, *_: object
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (x, weight, bias, emb))


def _fake_skip(x: Tensor, residual: Tensor, skip: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    torch._check(x.shape[:2] == skip.shape[:2], lambda: "x [N, R, C] and skip [N, R, C'] must have the same rows")
    out = x.new_empty((*x.shape[:2], x.shape[2] + skip.shape[2]))
    return out, torch.empty_like(out)


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, emb, ctx.groups, _, ctx.silu = inputs
    _, total, mean, rstd = output
    ctx.has_residual = residual.numel() > 0
    ctx.residual_shape = residual.shape
    ctx.save_for_backward(total if ctx.has_residual else x, weight, bias, emb, mean, rstd)
    ctx.mark_non_differentiable(*(output[2:] if ctx.has_residual else output[1:]))


def _backward(ctx: Any, grad: Tensor, grad_total: Tensor, *_: object) -> tuple:
    after = grad_total.contiguous() if ctx.has_residual else grad.new_empty(0)
    given = (grad.contiguous(), after, *ctx.saved_tensors, ctx.groups, ctx.silu)
    grad_x, *others = group_norm_silu_backward_op(*given)
    return grad_x, grad_x if ctx.has_residual else grad.new_empty(ctx.residual_shape), *others, None, None, None


def _cost(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool) -> Cost:
    # x, or the sum with the residual, is read twice, or once where a group fits into registers
    passes = (2 if reference.is_small(x.shape[1], x.shape[2] // groups) else 3) * x.numel() + 2 * residual.numel()
    return Cost(bytes=passes * x.element_size(), flops=(8 + 5 * silu) * x.numel() + residual.numel())


def _backward_cost(grad: Tensor, grad_total: Tensor, x: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, *rest: Any) -> Cost:
    elements = 5 * x.numel() + (2 if emb.numel() else 1) * grad_total.numel()
    return Cost(bytes=elements * x.element_size(), flops=(14 + 10 * rest[-1]) * x.numel() + grad_total.numel())


def _skip_cost(x: Tensor, residual: Tensor, skip: Tensor, *rest: Any) -> Cost:
    elements = x.numel() + skip.numel()
    passes = 3 if reference.is_small(x.shape[1], (x.shape[2] + skip.shape[2]) // rest[3]) else 4
    return Cost(
        bytes=(passes * elements + residual.numel()) * x.element_size(), flops=(8 + 5 * rest[-1]) * elements + residual.numel()
    )


def _library(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    total = x + emb.unsqueeze(-2) if emb.numel() else x
    total = total + residual if residual.numel() else total
    out = torch.nn.functional.group_norm(total.transpose(1, 2), groups, weight, bias, eps)
    return (torch.nn.functional.silu(out) if silu else out).transpose(1, 2), total


def _library_skip(
    x: Tensor, residual: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, emb: Tensor, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor]:
    own = x + emb.unsqueeze(-2) if emb.numel() else x
    own = own + residual if residual.numel() else own
    none = x.new_empty(0)
    return _library(torch.cat([own, skip], 2), none, weight, bias, none, groups, eps, silu)


_TYPES = {
    **dict.fromkeys(("grad_ptr", "x_ptr", "emb_ptr", "weight_ptr", "bias_ptr", "out_ptr", "grad_emb_ptr"), "*bf16"),
    **dict.fromkeys(("residual_ptr", "skip_ptr", "total_ptr", "grad_total_ptr"), "*bf16"),
    **dict.fromkeys(("partial_ptr", "mean_ptr", "rstd_ptr", "means_ptr", "sums_ptr", "affine_ptr"), "*fp32"),
    **dict.fromkeys(("rows", "own", "channels", "groups", "programs", "samples"), "i32"),
    "eps": "fp32",
}
_TILE = {"ROWS": 128, "BLOCK_R": 16, "BLOCK_C": 64}
_AFFINE = "x_ptr emb_ptr weight_ptr bias_ptr mean_ptr rstd_ptr"
_SIZES = "rows channels groups"
_STATISTICS = "x_ptr residual_ptr skip_ptr emb_ptr total_ptr partial_ptr rows own channels programs"
_FORMS = ({"HAS_RESIDUAL": False, "EMB": 2}, {"HAS_RESIDUAL": True, "EMB": 2})
_FORMS_BACKWARD = ({"HAS_RESIDUAL": False, "EMB": 2}, {"HAS_RESIDUAL": True, "EMB": 0})  # the stored sum has emb in it
_WIDTHS = (16, 64)  # 320 and 1280 channels in 32 groups: 10 and 40, rounded up to a power of two


def _kernel(
    name: str, arguments: str, constants: dict, warps: int = 4, module: str = "triton", multiples: tuple[str, ...] = ()
) -> TritonKernel:
    signature = {n: _TYPES[n] for n in arguments.split()}
    return TritonKernel(f"group_norm_silu.{module}", name, signature, constants, warps, multiples=multiples)


def _small(width: int, block: int, warps: int, skip: bool, **form: Any) -> TritonKernel:
    """For groups of this width, all of whose elements fit into a block."""
    arguments = f"{_AFFINE} residual_ptr skip_ptr total_ptr out_ptr eps rows own groups"
    constants = {**form, "SKIP": skip, "SILU": True, "WIDTH": width, "BLOCK": block}
    return _kernel("small_kernel", arguments, constants, warps, multiples=("own",))


_kernel_backward = partial(_kernel, module="triton_backward")


_SHAPES: dict[str, dict] = {
    "frames_16x320x512_320": {"shape": (16, 40 * 64, 320)},
    "clip_16x320x512_320": {"shape": (1, 16 * 40 * 64, 320)},
    "frames_16x320x512_1280": {"shape": (16, 5 * 8, 1280)},
    "frames_25x576x1024_320": {"shape": (25, 72 * 128, 320)},
}
_BENCHMARKS = {
    name + suffix: {**given, "groups": 32, **more}
    for suffix, more in (("", {}), ("_residual", {"residual": True, "emb": 1}))
    for name, given in _SHAPES.items()
}
_ODD: dict[str, dict] = {
    "joint": {"shape": (1, 263, 40), "groups": 5, "emb": 0},
    "plain": {"shape": (3, 130, 32), "groups": 8, "emb": 0, "silu": False},
    "across_programs": {"shape": (2, 1031, 40), "groups": 4},
    "wide": {"shape": (2, 150, 132), "groups": 1, "silu": False},
    "residual_across_programs": {"shape": (2, 1031, 40), "groups": 4, "emb": 1, "residual": True},
    "residual_wide": {"shape": (2, 150, 132), "groups": 1, "residual": True},
    "empty": {"shape": (0, 5, 8), "groups": 2, "residual": True},
}
_SMALL: dict[str, dict] = {
    "small": {"shape": (2, 3, 6), "groups": 3},
    "without_emb": {"shape": (2, 7, 4), "groups": 2, "emb": 0},
    "shared_emb": {"shape": (3, 2, 4), "groups": 2, "emb": 1},
    "without_silu": {"shape": (3, 1, 10), "groups": 2, "silu": False},
    "residual": {"shape": (2, 3, 6), "groups": 3, "residual": True},
    "residual_shared_emb": {"shape": (2, 3, 4), "groups": 2, "emb": 1, "residual": True},
    "residual_without_emb": {"shape": (2, 3, 4), "groups": 1, "emb": 0, "residual": True},
}
FORWARD = OpSpec(
    name="group_norm_silu",
    schema="(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor emb, int groups, float eps, bool silu)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.group_norm_silu,
    fake=_fake,
    fast=launcher("group_norm_silu.triton", "group_norm_silu"),
    available=unavailable,
    supports=lambda x, residual, weight, bias, emb, *_: unsupported(x, residual, weight, bias, emb),
    setup_context=_context,
    backward=_backward,
    grad_args=(0, 1, 2, 3, 4),
    cases=(
        *(Case(name, partial(_inputs, **given), gradcheck=True) for name, given in _SMALL.items()),
        *(Case(name, partial(_inputs, **given)) for name, given in _ODD.items()),
    ),
    benchmarks=tuple(Case(name, partial(_inputs, **given)) for name, given in _BENCHMARKS.items()),
    tolerance=Tolerance(forward=1e-5, backward=2e-5),
    cost=_cost,
    baselines={"eager": reference.group_norm_silu, "library": _library},
    kernels=(
        *(
            _kernel(
                "statistics_kernel",
                _STATISTICS,
                {**_TILE, **form, "SKIP": False, "ROWS": rows, "UNROLL": unroll, "ONCE": once},
            )
            for form, rows, unroll, once in zip(_FORMS, (256, 64), (4, 1), (False, True), strict=True)
        ),
        *(
            _kernel(
                "combine_kernel",
                f"partial_ptr emb_ptr weight_ptr bias_ptr mean_ptr rstd_ptr affine_ptr eps {_SIZES} programs",
                {"EMB": 2, "FOLD": True, "ROWS": 256, "BLOCK_P": p, "BLOCK_J": j},
                warps,
            )
            for p, j, warps in ((16, 16, 2), (256, 16, 16), (4, 64, 2), (64, 64, 16))  # a frame's and a clip's blocks of rows
        ),
        _kernel(
            "normalise_kernel",
            "x_ptr bias_ptr affine_ptr out_ptr rows channels programs",
            {**_TILE, "ROWS": 32, "BLOCK_R": 32, "SILU": True, "FOLD": True, "ONCE": True},
        ),
        *(
            _small(width, block, warps, skip=False, **form)
            for form in _FORMS
            for width, block, warps in ((10, 8192, 16), (20, 16384, 16), (40, 2048, 4), (40, 8192, 16))
        ),
    ),
)
BACKWARD = OpSpec(
    name="group_norm_silu_backward",
    schema="(Tensor grad, Tensor grad_total, Tensor x, Tensor weight, Tensor bias, Tensor emb, Tensor mean, Tensor rstd,"
    " int groups, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.group_norm_silu_backward,
    fake=_fake_backward,
    fast=launcher("group_norm_silu.triton_backward", "group_norm_silu_backward"),
    available=unavailable,
    supports=lambda grad, grad_total, x, weight, bias, emb, mean, rstd, *_: (
        unsupported(grad, grad_total, x, weight, bias, emb) or unsupported(mean, rstd, dtypes=(torch.float32,))
    ),
    cases=tuple(Case(name, partial(_gradients, **given)) for name, given in {**_SMALL, **_ODD}.items()),
    benchmarks=tuple(Case(name, partial(_gradients, **given)) for name, given in _BENCHMARKS.items()),
    tolerance=Tolerance(forward=2e-5),
    cost=_backward_cost,
    baselines={"eager": reference.group_norm_silu_backward},
    kernels=(
        *(
            _kernel_backward(
                "sums_kernel",
                f"grad_ptr grad_total_ptr {_AFFINE} partial_ptr {_SIZES} programs",
                {**_TILE, **form, "ROWS": 256, "EMB_SUMS": True, "SILU": True, "UNROLL": 2},
            )
            for form in _FORMS_BACKWARD
        ),
        *(
            _kernel_backward(
                "combine_backward_kernel",
                f"partial_ptr weight_ptr rstd_ptr means_ptr sums_ptr grad_emb_ptr {_SIZES} programs samples",
                {"EMB_SUMS": True, "BLOCK_P": 2048 // j, "BLOCK_J": j},
                warps=8,
            )
            for j in _WIDTHS
        ),
        *(
            _kernel_backward(
                "gradient_kernel",
                f"grad_ptr grad_total_ptr {_AFFINE} means_ptr out_ptr {_SIZES} programs",
                {**_TILE, **form, "SILU": True, "BLOCK_R": 32, "ONCE": True},
            )
            for form in _FORMS_BACKWARD
        ),
        *(
            _kernel_backward(
                "small_backward_kernel",
                f"grad_ptr grad_total_ptr {_AFFINE} sums_ptr grad_emb_ptr out_ptr rows groups samples",
                {**form, "EMB_SUMS": True, "SILU": True, "WIDTH": width, "BLOCK_R": 4096 // j, "BLOCK_J": j},
                warps=4,
            )
            for form in _FORMS_BACKWARD
            for width, j in ((10, 16), (40, 64))
        ),
        column_sums_kernel("*bf16"),
        column_sums_kernel("*bf16", third=True),
    ),
)

GIVEN = OpSpec(
    name="group_norm_silu_given",
    schema="(Tensor x, Tensor partial, Tensor weight, Tensor bias, int groups, float eps, bool silu) -> Tensor",
    reference=reference.group_norm_silu_given,
    fake=lambda x, *_: torch.empty_like(x),
    fast=launcher("group_norm_silu.triton", "group_norm_silu_given"),
    available=unavailable,
    supports=lambda x, partial, weight, bias, *_: unsupported(x, weight, bias) or unsupported(partial, dtypes=(torch.float32,)),
    cases=(
        Case("small", partial(_given, shape=(2, 3, 6), groups=3)),
        Case("joint", partial(_given, shape=(1, 263, 40), groups=5)),
        Case("across_programs", partial(_given, shape=(2, 1031, 40), groups=4, silu=False)),
    ),
    benchmarks=(Case("clip_16x320x512_320", partial(_given, shape=(1, 16 * 40 * 64, 320), groups=32)),),
    tolerance=Tolerance(forward=1e-5),
    cost=lambda x, *_: Cost(bytes=2 * x.numel() * x.element_size(), flops=9 * x.numel()),
    baselines={"eager": reference.group_norm_silu_given},
)

SKIP = OpSpec(
    name="group_norm_silu_skip",
    schema="(Tensor x, Tensor residual, Tensor skip, Tensor weight, Tensor bias, Tensor emb, int groups, float eps, bool silu)"
    " -> (Tensor, Tensor)",
    reference=reference.group_norm_silu_skip,
    fake=_fake_skip,
    fast=launcher("group_norm_silu.triton", "group_norm_silu_skip"),
    available=unavailable,
    supports=lambda *given: unsupported(*given[:6]),
    cases=(
        Case("small", partial(_beside, shape=(2, 3, 4), further=2, groups=3, emb=1)),
        Case("without_residual", partial(_beside, shape=(2, 3, 2), further=6, groups=2, emb=2, residual=False)),
        Case("across_programs", partial(_beside, shape=(2, 263, 64), further=40, groups=4)),
        Case("aligned", partial(_beside, shape=(1, 37, 64), further=128, groups=6, emb=1)),
        Case("aligned_without_residual", partial(_beside, shape=(2, 9, 128), further=72, groups=5, emb=2, residual=False)),
        Case("empty", partial(_beside, shape=(0, 5, 4), further=4, groups=2)),
    ),
    benchmarks=tuple(
        Case(f"16x320x512_{name}", partial(_beside, shape=(16, rows, own), further=further, groups=32))
        for name, rows, own, further in (
            ("640_320", 2560, 640, 320),
            ("320_320", 2560, 320, 320),
            ("640_640", 640, 640, 640),
            ("1280_1280", 160, 1280, 1280),
            ("1280_1280_innermost", 40, 1280, 1280),
        )
    ),
    tolerance=Tolerance(forward=1e-5),
    cost=_skip_cost,
    baselines={"eager": reference.group_norm_silu_skip, "library": _library_skip},
    kernels=(
        *(
            _kernel(
                "statistics_kernel",
                _STATISTICS,
                {**_TILE, "HAS_RESIDUAL": residual, "SKIP": True, "ROWS": 64, "EMB": emb, "UNROLL": 1, "ONCE": True},
            )
            for residual, emb in ((True, 0), (False, 1))
        ),
        *(_small(80, block, warps, skip=True, HAS_RESIDUAL=True, EMB=0) for block, warps in ((4096, 8), (16384, 16))),
    ),
)

group_norm_silu_backward_op = build_op(BACKWARD)
group_norm_silu_op = build_op(FORWARD)
group_norm_silu_given_op = build_op(GIVEN)
group_norm_silu_skip_op = build_op(SKIP)
SPECS = (FORWARD, BACKWARD, GIVEN, SKIP)
