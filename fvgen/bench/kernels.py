"""Every operator at its real shapes, beside its eager reference, torch.compile of it and the libraries its spec names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fvgen import kernels
from fvgen.bench.timing import Timing, cold_copies, strict_kernels, time_calls
from fvgen.kernels._dispatch import machine_path
from fvgen.utils.errors import UserError

if TYPE_CHECKING:
    from fvgen.kernels._spec import Case, OpSpec

Say = Callable[[str], None]
COMPILE = "torch.compile"


def choose_specs(names: Sequence[str] | None = None, quick: bool = False) -> list[OpSpec]:
    """The operators to measure: those with benchmark shapes (``quick``: all), or the named ones.

    Raises:
        UserError: a name that is no operator.
    """
    specs = {spec.name: spec for spec in kernels.iter_specs()}
    unknown = [name for name in names or () if name not in specs]
    if unknown:
        raise UserError(f"there is no operator {unknown[0]!r}; choose from {', '.join(specs)}")
    chosen = [specs[name] for name in names] if names else list(specs.values())
    with_shapes = [spec for spec in chosen if quick or spec.benchmarks]
    if not with_shapes:
        raise UserError(f"{', '.join(s.name for s in chosen)} has no benchmark shapes; measure its small test case with --quick")
    return with_shapes


def work_of(spec: OpSpec, quick: bool = False) -> tuple[Case, ...]:
    """The cases of an operator that are measured: its first stands for it in the summary."""
    return spec.cases[:1] if quick else spec.benchmarks


def workloads(specs: Sequence[OpSpec], quick: bool = False, first: bool = False) -> Iterator[tuple[OpSpec, Case]]:
    """Each operator with its benchmark shapes, the first of them, or its first small test case that is not empty."""
    for spec in specs:
        for case in work_of(spec, quick)[: 1 if first else None]:
            yield spec, case


def working_dtype(spec: OpSpec, device: str) -> torch.dtype:
    """bfloat16, or float32 for an operator whose GPU version takes only that."""
    try:
        reason = spec.supports(*spec.cases[0].make(device, torch.bfloat16))
    except (RuntimeError, NotImplementedError):
        return torch.float32
    return torch.bfloat16 if reason is None else torch.float32


def measure_kernels(
    device: str,
    copy_rate: float,
    names: Sequence[str] | None = None,
    rounds: int = 30,
    compile: bool = True,
    quick: bool = False,
    say: Say = lambda _: None,
    first: bool = False,
) -> Iterator[dict[str, Any]]:
    """One record per operator and shape.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        copy_rate: bytes per second of a copy, see :func:`fvgen.bench.bandwidth.copy_bandwidth`.
        names: operators; None for all with benchmark shapes.
        rounds: readings per time.
        compile: also time torch.compile of the eager version.
        quick: small test cases instead of real shapes.
        say: told what is measured next.
        first: only the first of each operator's shapes.

    Raises:
        UserError: a name that is no operator.
    """
    work = list(workloads(choose_specs(names, quick), quick, first))
    for n, (spec, case) in enumerate(work, 1):
        say(f"[{n}/{len(work)}] {spec.name} {case.name}")
        with strict_kernels(), torch.no_grad():
            record = measure_kernel(spec, case, device, copy_rate, rounds, compile)
        yield record
        if case is work_of(spec, quick)[0]:
            yield from _ratios(record)
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def _ratios(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The two figures of an operator that the summary holds, as records of their own."""
    units = {"bandwidth_fraction": "of the copy bandwidth", "vs_compile": "x"}
    for key, unit in units.items():
        if record.get(key) is not None:
            shared = {name: record[name] for name in ("op", "case", "dtype")}
            yield {"name": f"kernel_{record['op']}_{key}", "suite": "summary", **shared, "value": record[key], "unit": unit}


def measure_kernel(
    spec: OpSpec, case: Case, device: str, copy_rate: float, rounds: int = 30, compile: bool = True
) -> dict[str, Any]:
    """The record of one operator at one shape; what fails is in it with its reason.

    Its keys: ``median_ms`` and spread of the operator, ``others`` (name -> time or reason of failure), ``bytes`` and ``flops`` of
    the least work, ``bandwidth_fraction`` of the measured copy bandwidth, ``vs_reference`` and ``vs_compile`` (how many times as
    long those take).
    """
    dtype = working_dtype(spec, device)
    record: dict[str, Any] = {
        "name": f"kernel_{spec.name}_{case.name}_ms",
        "suite": "kernels",
        "op": spec.name,
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "path": machine_path(spec)[0] if device.startswith("cuda") else "reference",
        "unit": "ms",
    }
    try:
        copies = cold_copies(case.make(device, dtype), device)
        own = _time(getattr(torch.ops.fvgen, spec.name).default, copies, device, rounds)
    except Exception as error:
        return {**record, "median_ms": None, "failed": reason(error)}
    record |= {**own.fields(), "copies": len(copies), **_work(spec, copies[0], own, copy_rate)}
    others: dict[str, dict[str, Any]] = {}
    for name, function in _rivals(spec, compile).items():
        try:
            others[name] = _time(function, copies, device, rounds).fields()
        except Exception as error:
            others[name] = {"median_ms": None, "failed": reason(error)}
    if compile:
        torch._dynamo.reset()
    times = {name: entry["median_ms"] for name, entry in others.items()}
    ratios = {name: None if ms is None else ms / own.median_ms for name, ms in times.items()}
    return {**record, "vs_reference": ratios["reference"], "vs_compile": ratios.get(COMPILE), "others": others}


def _rivals(spec: OpSpec, compile: bool) -> dict[str, Callable[..., Any]]:
    rivals = {"reference": spec.reference}
    rivals |= {name: function for name, function in spec.baselines.items() if function is not spec.reference}
    if compile:
        chain = spec.baselines.get("randn") or spec.baselines.get("eager", spec.reference)
        rivals[COMPILE] = torch.compile(chain, dynamic=False)
    return rivals


def _time(function: Callable[..., Any], copies: list[tuple], device: str, rounds: int) -> Timing:
    return time_calls([partial(function, *args) for args in copies], device, rounds, graph=True, seconds=3.0)


def _work(spec: OpSpec, args: tuple, own: Timing, copy_rate: float) -> dict[str, Any]:
    """Bytes and operations of a call, and the rates that follow from its time."""
    if spec.cost is None:
        return {"bytes": None, "flops": None, "bytes_per_second": None, "flops_per_second": None, "bandwidth_fraction": None}
    cost, seconds = spec.cost(*args), 1e-3 * own.median_ms
    return {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "bytes_per_second": cost.bytes / seconds,
        "flops_per_second": cost.flops / seconds,
        "copy_bytes_per_second": copy_rate,
        "bandwidth_fraction": cost.bytes / seconds / copy_rate,
    }


def reason(error: BaseException) -> str:
    """Type and first line of an error, for a record."""
    with contextlib.suppress(Exception):
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return "out of GPU memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
