"""Replayed calls give what plain calls give, also between updates of the weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fvgen.diffusion.predict import unet_predictor
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.classifier import unet_trunk
from fvgen.distill.comparison import RUNS, make_run
from fvgen.distill.graphs import GraphedCall, Pools
from fvgen.distill.methods import Method
from fvgen.distill.networks import Batch, Draws
from fvgen.distill.parallel import Parallel, put, sharded, whole
from fvgen.distill.roles import Roles, build_roles
from fvgen.distill.rollout import Process

from .small import SETTINGS, SHAPE, GpuLatents, Latents, on_gpu, on_ranks, small_teacher, small_trainer


def test_without_a_gpu_it_is_the_call_itself() -> None:
    unet, batch = small_teacher().unet, Latents().read([0, 1])
    plain = unet_predictor(unet)
    x, t = torch.randn(2, *SHAPE), torch.tensor([999, 249])
    assert torch.equal(GraphedCall(unet, plain)(x, t, batch.condition), plain(x, t, batch.condition))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["kept", "checkpointed", "frozen"])
def test_values_and_gradients(kind: str) -> None:
    """Parameters' gradients add up over calls; a frozen network's gradient goes to its input."""
    frozen = kind == "frozen"
    unet = small_teacher().unet.cuda().requires_grad_(not frozen)
    if kind == "checkpointed":
        unet.train().enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    call = unet_trunk(unet) if frozen else unet_predictor(unet)
    graphed = GraphedCall(unet, call)
    results: dict[str, list[torch.Tensor]] = {}
    for name, function in (("graphed", graphed), ("plain", call)):
        for p in unet.parameters():
            p.grad = None if p.grad is None else torch.zeros_like(p) if name == "plain" else p.grad.zero_()
        found = results.setdefault(name, [])
        torch.manual_seed(0)
        for step in range(3):
            condition = on_gpu(Latents().read([2 * step, 2 * step + 1]).condition)
            x, t = torch.randn(2, *SHAPE).cuda().requires_grad_(frozen), torch.tensor([999, 249 + step]).cuda()
            with torch.no_grad():
                found.append(function(x, t, condition))
            out = function(x, t, condition)
            out.square().sum().backward()
            found.append(out.detach())
            if frozen:
                found.append(x.grad.clone())
        found += [p.grad.clone() for p in unet.parameters() if p.grad is not None]
    assert len(results["graphed"]) == len(results["plain"])
    for a, b in zip(results["graphed"], results["plain"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_call_between_two_passes_is_noticed() -> None:
    """Where it takes the activations; one in the other pool does no harm."""
    unet, frozen = (small_teacher().unet.cuda().requires_grad_(train) for train in (True, False))
    pools = Pools()
    first, second = (GraphedCall(unet, unet_predictor(unet), pools) for _ in range(2))
    other = GraphedCall(frozen, unet_predictor(frozen), pools)
    condition, t = on_gpu(Latents().read([0, 1]).condition), torch.tensor([999, 249]).cuda()
    x = torch.randn(2, *SHAPE).cuda()
    out = first(x, t, condition)
    other(x, t, condition)
    out.sum().backward()
    out = first(x, t, condition)
    second(x, t, condition)
    with pytest.raises(RuntimeError, match="activations of this call are gone"):
        out.sum().backward()


def _methods() -> list[tuple[str, int]]:
    """Every stage of every run that is trained in another way than those before it."""
    seen: list[Method] = []
    found = []
    for name in RUNS:
        for i, method in enumerate(make_run(name, Process.create(NoiseSchedule.create()))):
            alike = [repr(replace(m, process=None)) for m in seen]
            if repr(replace(method, process=None)) not in alike:
                seen.append(method)
                found.append((name, i))
    return found


def _gradients(
    method: Method, roles: Roles, step: str, batch: Batch, seed: int, recorded: bool, parallel: Parallel
) -> dict[str, torch.Tensor]:
    """Of what an update trains, by name; means over the ranks, which the backward passes of pieces have taken already."""
    for p in (p for module in roles.trained.values() for p in module.parameters()):
        p.grad = None if p.grad is None or not recorded else p.grad.zero_()
    update = getattr(method, step)(roles.networks, batch, Draws(seed, seed + 1))
    update.total.backward()
    return {
        f"{name}.{part}": whole(p.grad).clone() if sharded(p) else parallel.mean(p.grad.clone())
        for name in update.losses
        for part, p in roles.trained[name].named_parameters()
        if p.grad is not None
    }


def _compare(run: str, number: int, checkpointing: bool, layout: str = "replicate") -> None:
    """Critic and student updates in turn, rollouts of every length, graphs in shared memory; the weights change in between.

    Graphs in this layout against whole networks without any.
    """
    parallel = Parallel.start("cuda", layout)
    settings = replace(SETTINGS, run=run, batch=2 * parallel.world, micro_batch=2, checkpointing=checkpointing)
    method: Any = make_run(run, Process.create(NoiseSchedule.create(), parallel.device))[number]
    if method.critic_updates:
        method = replace(method, config=replace(method.config, inputs="rollout"))
    found = {
        graphs: build_roles(small_teacher(), method, replace(settings, graphs=graphs), among)
        for graphs, among in ((False, replace(parallel, mesh=None)), (True, parallel))
    }
    steps = ["critic_update", "student_update"] if method.critic_updates else ["student_update"]
    for seed in range(6):
        first = 2 * (seed * parallel.world + parallel.rank)
        batch = GpuLatents().read([first, first + 1])
        if not method.critic_updates:
            states = torch.stack([batch.clean + i for i in range(len(method.config.times))], 1)
            batch = replace(batch, ode_states=states, ode_clean=batch.clean)
        for step in steps:
            plain, replayed = (_gradients(method, found[g], step, batch, seed, g, parallel) for g in (False, True))
            assert plain.keys() == replayed.keys()
            length = float(torch.stack(torch._foreach_norm(list(plain.values()))).norm())
            for name, gradient in plain.items():  # sums of the backward passes may be in another order, and rounded to bfloat16
                apart, norm = float((replayed[name] - gradient).norm()), float(gradient.norm())
                assert apart <= 0.05 * norm + 1e-3 * length, f"{step} {seed}: {name} is {apart} of {norm} apart"
            for role, module in found[False].trained.items():
                with torch.no_grad():
                    for p, q in zip(module.parameters(), found[True].trained[role].parameters(), strict=True):
                        put(q, p.mul_(0.99))
    parallel.stop()


@pytest.mark.gpu
@pytest.mark.parametrize(("run", "number"), _methods())
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_every_method(run: str, number: int, checkpointing: bool) -> None:
    _compare(run, number, checkpointing)


@pytest.mark.multi_gpu
@pytest.mark.parametrize(("run", "number"), [("fvgen", 0), ("fvgen", 1)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_shared_networks(run: str, number: int, checkpointing: bool) -> None:
    """The ranks' exchange is recorded too: layers are fetched, and gradients averaged, inside of the graphs."""
    assert on_ranks(2, _compare, run, number, checkpointing, "shard", seconds=120) == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_graphs_is_training_without(checkpointing: bool, tmp_path: Path) -> None:
    runs = {}
    for graphs in (False, True):
        parallel = Parallel.start("cuda")
        settings = replace(SETTINGS, graphs=graphs, checkpointing=checkpointing, micro_batch=2)
        trainer = small_trainer(tmp_path / str(graphs), settings, parallel, source=GpuLatents())
        for _ in range(6):
            trainer.advance()
        trainer.close()
        runs[graphs] = [x.clone() for x in trainer.roles.trained["student"].parameters()]
    change = max(float((a - b.cuda()).abs().max()) for a, b in zip(runs[True], small_teacher().unet.parameters(), strict=True))
    apart = max(float((a - b).abs().max()) for a, b in zip(*runs.values(), strict=True))
    assert apart < 0.2 * change  # bfloat16 and Adam's sign-like first steps; a wrong gradient is as far as the whole change
