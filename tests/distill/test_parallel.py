"""Several processes against one with the same global batch. Only the order of additions differs."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fvgen.distill import checkpoint
from fvgen.distill.logs import LOSSES
from fvgen.distill.optimiser import NetworkOptimiser
from fvgen.distill.parallel import Parallel
from fvgen.distill.settings import Cadence
from fvgen.utils.errors import UserError

from .small import SETTINGS, in_process, on_ranks, small_trainer, train

TWO = replace(SETTINGS, micro_batch=2)  # two forward calls per update, on one process or on two
RUN = {"settings": TWO, "cadence": Cadence(log=2, checkpoint=100, validate=0)}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    assert in_process(train, folder, **RUN, iterations=3) == 0
    return folder


def compare(folder: Path, single: Path) -> None:
    """Losses and weights, to the rounding of float32 sums; Adam's first steps divide it by itself, hence not tighter."""
    for ours, theirs in zip(*((f / LOSSES).read_text().splitlines() for f in (folder, single)), strict=True):
        found, expected = json.loads(ours), json.loads(theirs)
        assert found.pop("update") == expected.pop("update")
        assert found == pytest.approx(expected, rel=2e-4, abs=2e-6)
    ours, theirs = (checkpoint.latest(f / "checkpoints") for f in (folder, single))
    assert ours.name == theirs.name
    for role in ("student", "fake", "head", "ema"):
        found, expected = (load_file(p / f"{role}.safetensors") for p in (ours, theirs))
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("layout", ["replicate", "shard"])
def test_two_processes_do_what_one_does(layout: str, single: Path, tmp_path: Path) -> None:
    assert on_ranks(2, train, tmp_path, **RUN, layout=layout, iterations=3) == [0, 0]
    compare(tmp_path, single)


def test_more_processes_than_rows(tmp_path: Path) -> None:
    """The last convolution has two rows of weights, so that the third process holds nothing of it."""
    run = {**RUN, "settings": replace(TWO, batch=6)}
    assert in_process(train, tmp_path / "one", **run, iterations=2) == 0
    assert on_ranks(3, train, tmp_path / "three", **run, layout="shard", iterations=2) == [0, 0, 0]
    compare(tmp_path / "three", tmp_path / "one")


@pytest.mark.multi_gpu
def test_two_gpus_share_a_run(tmp_path: Path) -> None:
    """With recorded calls: the first update is that of one GPU, and copies of whole networks go on from its checkpoint."""
    one, two = tmp_path / "one", tmp_path / "two"
    run = {**RUN, "settings": replace(TWO, graphs=True, checkpointing=True), "device": "cuda"}
    assert in_process(train, one, **run, iterations=1) == 0
    assert on_ranks(2, train, two, **run, layout="shard", iterations=2, seconds=120) == [0, 0]
    found, expected = (json.loads((folder / LOSSES).read_text().splitlines()[0]) for folder in (two, one))
    assert found.pop("update") == expected.pop("update")
    assert found == pytest.approx(expected, rel=0.03, abs=1e-3)  # bfloat16, and sums in another order
    assert on_ranks(2, train, two, **run, layout="replicate", iterations=3, seconds=120) == [0, 0]
    assert len((two / LOSSES).read_text().splitlines()) == 6


def test_the_mean_of_the_weights_is_over_all_processes(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert in_process(train, one, **RUN, iterations=3, weight_mean=True) == 0
    assert on_ranks(2, train, two, **RUN, iterations=3, weight_mean=True) == [0, 0]
    compare(two, one)
    found, expected = (
        load_file(checkpoint.latest(folder / "checkpoints") / "weight_mean.safetensors")["value"] for folder in (two, one)
    )
    assert expected != 0.5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # sums of float32 in another order


def average_some_gradients() -> None:
    """Gradients of many sizes and strides; the mean over ranks 0 and 1 of ``g (1 + rank)`` is 1.5 g."""
    parallel = Parallel.start("cpu")
    sizes = [(3,), (2, 4), (25,), (1,), (), (5, 2), (4,), (0,), (70,)]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    parameters.append(nn.Parameter(torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)))
    frozen = nn.Parameter(torch.zeros(2), requires_grad=False)
    optimiser = NetworkOptimiser(nn.ParameterList([*parameters, frozen]), SETTINGS, parallel)
    expected = [torch.arange(p.numel(), dtype=torch.float32).view(p.shape) - 3 for p in parameters]
    for _ in range(2):
        optimiser.zero()
        for p, e in zip(parameters, expected, strict=True):
            (p * e * (1 + parallel.rank)).sum().backward()
        norm = optimiser.step(0.0)
        for p, e in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.grad, 1.5 * e, rtol=0, atol=0)
            assert p.grad.stride() == p.stride()
        torch.testing.assert_close(norm, torch.cat([1.5 * e.flatten() for e in expected]).norm())
    assert frozen.grad is None
    assert parallel.mean(torch.tensor([2.0 + parallel.rank])).item() == 2.5
    parallel.stop()


def test_gradients_are_averaged_in_a_row() -> None:
    assert on_ranks(2, average_some_gradients) == [0, 0]


def test_a_replaced_gradient_is_noticed() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimiser = NetworkOptimiser(nn.ParameterList([parameter]), SETTINGS, Parallel(0, 1, torch.device("cpu")))
    parameter.grad = torch.ones(3)
    with pytest.raises(AssertionError, match="replaced"):
        optimiser.step(0.0)


def test_a_checkpoint_moves_between_layouts(single: Path, tmp_path: Path) -> None:
    """One process, then two that share the networks, then one again."""
    assert in_process(train, tmp_path, **RUN, iterations=1) == 0
    assert on_ranks(2, train, tmp_path, **RUN, layout="shard", iterations=2) == [0, 0]
    assert in_process(train, tmp_path, **RUN, iterations=3) == 0
    compare(tmp_path, single)


def test_a_rank_that_dies_ends_the_others(tmp_path: Path) -> None:
    first, second = on_ranks(2, train, tmp_path, **RUN, iterations=3, dies_at=2)
    assert second == -signal.SIGKILL
    assert first not in (0, -signal.SIGKILL)  # an error of its own, long before it would have been killed for hanging


def test_bad_layouts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torchrun"):
        Parallel.start("cpu", "shard")
    with pytest.raises(UserError, match="replicate"):
        Parallel.start("cpu", "halves")
    with pytest.raises(UserError, match="--micro-batch 2"):
        small_trainer(tmp_path, parallel=Parallel(0, 2, torch.device("cpu")))
