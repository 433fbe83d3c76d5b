"""The description of one operator, from which it is built, tested and benchmarked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fvgen.kernels._triton import TritonKernel


def _always(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Case:
    """Arguments for a test or a benchmark.

    Attributes:
        name: shown as the test's name.
        make: ``make(device, dtype) -> tuple`` of positional arguments; the same values at every call.
        gradcheck: small and smooth enough for finite differences in float64.
        differentiable: False for arguments that switch the backward pass off.
    """

    name: str
    make: Callable[..., tuple]
    gradcheck: bool = False
    differentiable: bool = True


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted error of the fast path, relative to the largest entry of the reference output (0 = bit for bit)."""

    forward: float = 0.0
    backward: float = 1e-5


@dataclass(frozen=True)
class Cost:
    """Least work of one call: bytes that must cross device memory and floating point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """One operator ``torch.ops.fvgen.<name>``.

    Attributes:
        name: operator name inside the namespace ``fvgen``.
        schema: argument and return list in torch's schema language, for example ``"(Tensor x, float eps) -> Tensor"``.
        reference: plain PyTorch version; runs for CPU tensors and as the fallback for CUDA tensors.
        fake: shapes and dtypes of the outputs without data.
        fast: launcher for CUDA tensors with the same signature; None where only the reference exists.
        available: reason why ``fast`` cannot run on this machine, None if it can.
        supports: same arguments as the operator; reason why ``fast`` does not take them, None if it does.
        setup_context, backward: as in ``torch.library.register_autograd``; ``backward`` calls an operator of its own.
        grad_args: positions of the arguments that receive a gradient.
        cases: small odd test cases.
        benchmarks: real shapes.
        tolerance: see :class:`Tolerance`.
        cost: same arguments as the operator; :class:`Cost` of the call.
        baselines: name -> function with the operator's signature, to compare with in benchmarks. "eager" is what a model without
            the operator runs, as exact as a test may ask; "randn" the same with PyTorch's own noise, which torch.compile takes.
        kernels: Triton kernels behind ``fast``, for compilation without a GPU.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    fast: Callable[..., Any] | None = None
    available: Callable[[], str | None] = _always
    supports: Callable[..., str | None] = _always
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    grad_args: tuple[int, ...] = ()
    cases: tuple[Case, ...] = ()
    benchmarks: tuple[Case, ...] = ()
    tolerance: Tolerance = field(default_factory=Tolerance)
    cost: Callable[..., Cost] | None = None
    baselines: dict[str, Callable[..., Any]] = field(default_factory=dict)
    kernels: tuple[TritonKernel, ...] = ()
