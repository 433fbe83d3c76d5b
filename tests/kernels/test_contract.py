"""What every operator must fulfil, parametrised from the specs: a new folder in kernels/ is tested without further work."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fvgen import kernels
from fvgen.kernels import _dispatch
from fvgen.kernels._testing import as_tuple, assert_close, largest_error, poisoned_memory

SPECS = list(kernels.iter_specs())
ALL = [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS for c in s.cases]
FAST = [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS for c in s.cases if s.fast is not None]
SMOOTH = [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS for c in s.cases if s.grad_args and c.gradcheck]


def op(spec):
    return getattr(torch.ops.fvgen, spec.name).default


def with_gradients(spec, args: tuple) -> tuple:
    return tuple(a.detach().clone().requires_grad_() if i in spec.grad_args else a for i, a in enumerate(args))


def gradients(spec, args: tuple) -> dict[str, Tensor]:
    """Gradients by argument name for a fixed random upstream gradient."""
    args = with_gradients(spec, args)
    outputs = [o for o in as_tuple(op(spec)(*args)) if o.requires_grad]
    random = torch.Generator().manual_seed(0)
    upstream = [torch.randn(o.shape, generator=random, dtype=torch.float64).to(o) for o in outputs]
    names = [a.name for a in op(spec)._schema.arguments]
    found = torch.autograd.grad(outputs, [args[i] for i in spec.grad_args], upstream)
    return {names[i]: g for i, g in zip(spec.grad_args, found, strict=True)}


def assert_as_exact_as_pytorch(spec, args: tuple, fast: tuple) -> None:
    """The error of floating outputs against float64 is at most 1.5 times that of plain PyTorch, all from the same inputs.

    Half a unit in the last place of the largest entry comes on top, since plain PyTorch may happen to be exact. Outputs that stay
    in float32, such as statistics, come as close as sums in another order do: for them it is the tolerance of the float32 test.

    Args:
        args: arguments in half precision on the CPU, where plain PyTorch runs as well.
    """
    exact = as_tuple(spec.reference(*(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)))
    plain = as_tuple(spec.baselines.get("eager", spec.reference)(*args))
    for n, (f, p, e) in enumerate(zip(fast, plain, exact, strict=True)):
        name = f"{spec.name} output {n}"
        assert f.shape == e.shape, f"{name}: shape {list(f.shape)} instead of {list(e.shape)}"
        assert f.dtype == p.dtype, f"{name}: {f.dtype} instead of {p.dtype}"
        if f.is_floating_point():
            slack = spec.tolerance.forward if f.dtype == torch.float32 else torch.finfo(f.dtype).eps / 2
            error, of_pytorch = largest_error(f, e), largest_error(p, e)
            found = f"error {error:.2e} of the largest entry, plain PyTorch's {of_pytorch:.2e}"
            assert error <= 1.5 * of_pytorch + slack, f"{name}: {found}"


def test_there_are_operators():
    assert {"rasterize_fragments", "composite_points", "render_points"} <= {s.name for s in SPECS}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_spec_is_complete(spec):
    assert spec.cases, "an operator needs test cases"
    assert (spec.backward is None) == (not spec.grad_args) == (spec.setup_context is None)
    assert not spec.benchmarks or spec.cost is not None, "benchmark shapes need a cost to compare with the roofline"
    assert not spec.grad_args or any(c.gradcheck for c in spec.cases)


@pytest.mark.parametrize(("spec", "case"), ALL)
def test_opcheck(spec, case):
    args = case.make("cpu", torch.float32)
    if any(isinstance(a, Tensor) and a.numel() > 1000 for a in args):
        pytest.skip("opcheck runs on the small cases")
    torch.library.opcheck(op(spec), with_gradients(spec, args) if case.differentiable else args)


@pytest.mark.parametrize(("spec", "case"), SMOOTH)
def test_gradcheck(spec, case):
    args = with_gradients(spec, case.make("cpu", torch.float64))

    def differentiable(*a):
        return tuple(o for o in as_tuple(op(spec)(*a)) if o.is_floating_point())

    assert torch.autograd.gradcheck(differentiable, args, eps=1e-7, atol=1e-5, rtol=1e-4, nondet_tol=1e-9)


@pytest.mark.parametrize(("spec", "case"), ALL)
def test_reference_float32_follows_float64(spec, case):
    """No output of the float32 reference is left unwritten or NaN."""
    args = case.make("cpu", torch.float32)
    with poisoned_memory():
        out = as_tuple(op(spec)(*args))
    for o in out:
        assert bool(o.isfinite().all()) if o.is_floating_point() else bool((o >= -1).all())


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "case"), ALL)
def test_fast_equals_reference(spec, case, monkeypatch):
    args = case.make("cuda", torch.float32)
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    with poisoned_memory():
        fast = as_tuple(op(spec)(*args))
        fast_gradients = gradients(spec, args) if spec.grad_args and case.differentiable else {}
    expected = as_tuple(spec.reference(*case.make("cpu", torch.float32)))
    for n, (a, e) in enumerate(zip(fast, expected, strict=True)):
        assert_close(a, e, spec.tolerance.forward, f"{spec.name} output {n}")
    if fast_gradients:
        for name, e in gradients(spec, case.make("cpu", torch.float32)).items():
            assert_close(fast_gradients[name], e, spec.tolerance.backward, f"{spec.name} gradient of {name}")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("spec", "case"), FAST)
def test_half_precision_is_as_exact_as_pytorch(spec, case, dtype, monkeypatch):
    args = case.make("cpu", dtype)
    on_cuda = tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)
    if reason := spec.supports(*on_cuda):
        pytest.skip(f"no fast path: {reason}")
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    with poisoned_memory():
        fast = as_tuple(op(spec)(*on_cuda))
    if not any(o.numel() and o.is_floating_point() for o in fast):
        pytest.skip("no floating output has entries")
    assert_as_exact_as_pytorch(spec, args, fast)


@pytest.mark.gpu
@pytest.mark.parametrize(("spec", "case"), ALL)
def test_fast_forward_repeats(spec, case, monkeypatch):
    """The same call gives the same bits, except in backward operators, which may add in any order."""
    if spec.name.endswith("_backward"):
        pytest.skip("atomic sums")
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    args = case.make("cuda", torch.float32)
    first, second = as_tuple(op(spec)(*args)), as_tuple(op(spec)(*args))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [s for s in SPECS if s.grad_args], ids=lambda s: s.name)
def test_opcheck_on_cuda(spec, monkeypatch):
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    torch.library.opcheck(op(spec), with_gradients(spec, spec.cases[0].make("cuda", torch.float32)))


def test_poison_reaches_into_operators():
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert torch.zeros(2).new_empty(4).isnan().all()
        assert (torch.empty(2, dtype=torch.int32) < -1).all()
        leaky = torch.library.custom_op(
            "fvgen_test::leaky", lambda x: torch.empty_like(x), mutates_args=(), schema="(Tensor x) -> Tensor"
        )
        assert leaky(torch.zeros(3)).isnan().all()
    assert "new_empty" not in vars(torch.Tensor)


class TestDispatch:
    spec = SPECS[0]

    def test_reference_mode_wins(self, monkeypatch):
        monkeypatch.setenv("FVGEN_KERNELS", "reference")
        assert _dispatch.choose(self.spec, self.spec.cases[0].make("cpu", torch.float32)) is self.spec.reference
        assert {path for _, path, _ in kernels.status()} == {"reference"}

    def test_auto_falls_back_with_one_reason(self, monkeypatch, caplog):
        monkeypatch.setenv("FVGEN_KERNELS", "auto")
        monkeypatch.setattr(_dispatch, "_told", set())
        args = self.spec.cases[0].make("cpu", torch.float64)
        with caplog.at_level(logging.WARNING, "fvgen.kernels"):
            assert _dispatch.choose(self.spec, args) is self.spec.reference
            assert _dispatch.choose(self.spec, args) is self.spec.reference
        assert len(caplog.records) == 1
        assert self.spec.name in caplog.text

    def test_strict_raises_the_reason(self, monkeypatch):
        monkeypatch.setenv("FVGEN_KERNELS", "strict")
        with pytest.raises(RuntimeError, match="no fast path"):
            _dispatch.choose(self.spec, self.spec.cases[0].make("cpu", torch.float64))

    def test_unknown_mode(self, monkeypatch):
        monkeypatch.setenv("FVGEN_KERNELS", "fastest")
        with pytest.raises(ValueError, match="FVGEN_KERNELS"):
            _dispatch.choose(self.spec, ())

    def test_status_names_every_operator(self):
        rows = kernels.status()
        assert [name for name, _, _ in rows] == [s.name for s in SPECS]
        assert all(path in ("fast", "reference") and reason for _, path, reason in rows)


def test_the_folder_does_not_pass_for_the_published_package_of_its_plain_name():
    spec = importlib.util.spec_from_file_location("kernels", Path(kernels.__file__))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__version__ == "0"
    with pytest.raises(ImportError, match=r"fvgen\.kernels"):
        module.get_kernel  # noqa: B018
