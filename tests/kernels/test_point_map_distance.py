"""The distance of point maps against autograd in float64, its corners, and the kernels in Triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fvgen.kernels._testing import largest_error, poisoned_memory
from fvgen.kernels.point_map_distance import point_map_distance
from fvgen.kernels.point_map_distance.spec import SPEC
from tests.processes import interpret

MOVED = ("depths", "cameras", "motions")
NAMES = ("depths", "rays", "cameras", "motions", "points", "weights")


def as_written(depths: Tensor, rays: Tensor, cameras: Tensor, motions: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    own = torch.cat([depths[:, None] * rays, depths[:, None]], dim=1)
    world = torch.einsum("vij,vjp->vip", cameras[..., :3], own) + cameras[..., 3:]
    moved = torch.einsum("vmij,vmjp->vmip", motions[..., :3], points) + motions[..., 3:]
    return ((world[:, None] - moved).norm(dim=2) * weights).sum()


def inputs(case: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, Tensor]:
    make = next(c.make for c in SPEC.cases if c.name == case)
    return dict(zip(NAMES, make(device, dtype), strict=True))


def evaluated(function, given: dict[str, Tensor]) -> list[Tensor]:
    """Loss and gradients of three times the loss."""
    given = {n: x.detach().clone().requires_grad_() if n in MOVED else x for n, x in given.items()}
    loss = function(**given)
    return [loss.detach(), *torch.autograd.grad(3 * loss, [given[n] for n in MOVED])]


@pytest.mark.parametrize("case", ["small", "one_pixel", "odd"])
def test_loss_and_gradients_are_those_of_autograd(case):
    given = inputs(case)
    for found, expected in zip(evaluated(point_map_distance, given), evaluated(as_written, given), strict=True):
        assert largest_error(found, expected) <= 1e-12


def test_a_distance_of_zero_has_no_gradient():
    """Whatever its weight; the other pixels are unmoved by it."""
    given = inputs("zero_distance", torch.float32)
    before = evaluated(point_map_distance, given)
    assert bool((before[1][:, ::2] == 0).all())
    assert bool((before[1][:, 1::2] != 0).any())
    given["weights"][..., ::2] = 1e6
    for found, expected in zip(evaluated(point_map_distance, given), before, strict=True):
        assert torch.equal(found, expected)


def test_a_map_of_weight_zero_does_not_count():
    given = inputs("odd")
    _, _, _, of_motions = evaluated(point_map_distance, given)
    unused = (given["weights"] == 0).all(-1)
    assert unused.any()
    assert torch.equal((of_motions == 0).flatten(2).all(-1), unused)


def test_strided_inputs():
    given = inputs("odd")
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in given.items()}
    assert not strided["points"].is_contiguous()
    for found, expected in zip(evaluated(point_map_distance, strided), evaluated(point_map_distance, given), strict=True):
        assert torch.equal(found, expected)


def test_shapes_that_do_not_fit_are_named():
    given = {n: x.to("meta") for n, x in inputs("small").items()}
    with pytest.raises(RuntimeError, match="motions must have shape"):
        point_map_distance(**{**given, "motions": given["motions"][:, :1]})


_INTERPRETED = """
import torch
from fvgen.kernels._testing import largest_error
from fvgen.kernels.point_map_distance import reference, spec, triton
for case in spec.SPEC.cases:
    args = case.make("cpu", torch.float32)
    exact = reference.point_map_distance(*(a.double() for a in args))
    found = triton.point_map_distance(*args, triton.Tile(1024, 1))
    for e, f in zip(exact, found, strict=True):
        assert largest_error(f, e) <= 5e-6, case.name
"""


def test_kernels_in_the_interpreter(tmp_path):
    interpret(tmp_path, _INTERPRETED)


def on_a_gpu(given: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setenv("FVGEN_KERNELS", "strict")
    with poisoned_memory():
        return evaluated(point_map_distance, {n: x.cuda() for n, x in given.items()})


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c.name for c in SPEC.cases] + ["8_photos_288x512"])
def test_as_exact_as_pytorch(case, monkeypatch):
    """Against float64 from the same float32 inputs: at most 1.5 times the error of plain PyTorch, in the Euclidean norm.

    The largest error is that of the smallest distance, and chance. A distance of a tenth between points three units away is known
    to 2e-6 in float32; for few pixels plain PyTorch may be luckier than that, so 2e-6 comes on top.
    """
    make = next(c.make for c in (*SPEC.cases, *SPEC.benchmarks) if c.name == case)
    given = dict(zip(NAMES, make("cuda", torch.float32), strict=True))
    found = on_a_gpu(given, monkeypatch)
    monkeypatch.setenv("FVGEN_KERNELS", "reference")
    plain = evaluated(point_map_distance, given)
    exact = evaluated(point_map_distance, {n: x.double() for n, x in given.items()})
    for name, f, p, e in zip(("loss", *MOVED), found, plain, exact, strict=True):
        error, of_pytorch = (float((x.double() - e).norm() / e.norm().clamp(min=1e-30)) for x in (f, p))
        assert error <= 1.5 * of_pytorch + 2e-6, f"{name}: error {error:.2e}, plain PyTorch's {of_pytorch:.2e}"


@pytest.mark.gpu
def test_more_numbers_than_32_bits_count(monkeypatch):
    """Every map is two units behind the photo's plane z = 1, but for the last pixel of the last one, which lies on it."""
    photos, maps, pixels = 2, 3, 120_000_001
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GB of free GPU memory")
    points = torch.zeros(photos, maps, 3, pixels, device="cuda")
    assert points.numel() > 2**31
    points[:, :, 2] = 3.0
    points[-1, -1, 2, -1] = 1.0
    still = torch.eye(3, 4, device="cuda")
    given = {
        "depths": torch.ones(photos, pixels, device="cuda"),
        "rays": torch.zeros(2, pixels, device="cuda"),
        "cameras": still.repeat(photos, 1, 1),
        "motions": still.repeat(photos, maps, 1, 1),
        "points": points,
        "weights": torch.ones(photos, maps, pixels, device="cuda"),
    }
    loss, of_depths, of_cameras, of_motions = on_a_gpu(given, monkeypatch)
    assert float(loss) == pytest.approx(2.0 * (photos * maps * pixels - 1), rel=1e-6)
    expected = torch.full_like(of_depths, -3.0 * maps)
    expected[-1, -1] += 3
    assert torch.equal(of_depths, expected)
    row = torch.tensor([0.0, 0.0, 3.0, 1.0], device="cuda") * 3 * pixels
    torch.testing.assert_close(of_motions[..., 2, :], row.expand(photos, maps, 4), rtol=1e-6, atol=0.0)
    assert not bool(of_motions[..., :2, :].any())
    torch.testing.assert_close(
        of_cameras[:, 2, 2], torch.full((photos,), -3.0 * maps * pixels, device="cuda"), rtol=1e-6, atol=0.0
    )
