"""Every operator: at its real shapes on a GPU, and its smallest case on the CPU, which shows that the workloads build.

``fvgen bench kernels`` measures the same with cold caches and without launch overhead; these times contain both.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks.conftest import Timed
from fvgen.bench.kernels import choose_specs, working_dtype, workloads
from fvgen.bench.timing import cold_copies
from fvgen.kernels._spec import Case, OpSpec

pytest.importorskip("pytest_benchmark")


def params(quick: bool) -> list:
    return [pytest.param(s, c, id=f"{s.name}-{c.name}") for s, c in workloads(choose_specs(quick=quick), quick)]


def run(timed: Timed, spec: OpSpec, case: Case, device: str, rounds: int) -> None:
    dtype = working_dtype(spec, device)
    operator = getattr(torch.ops.fvgen, spec.name).default
    copies = cold_copies(case.make(device, dtype), device)
    facts = {"op": spec.name, "case": case.name, "dtype": str(dtype), "copies": len(copies)}
    if spec.cost is not None:
        facts["bytes"] = spec.cost(*copies[0]).bytes
    with torch.no_grad():
        timed([partial(operator, *args) for args in copies], device, rounds, **facts)


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "case"), params(quick=False))
def test_operator(timed: Timed, spec: OpSpec, case: Case) -> None:
    run(timed, spec, case, "cuda", rounds=30)


@pytest.mark.parametrize(("spec", "case"), params(quick=True))
def test_small_case_on_the_cpu(timed: Timed, spec: OpSpec, case: Case) -> None:
    run(timed, spec, case, "cpu", rounds=3)
