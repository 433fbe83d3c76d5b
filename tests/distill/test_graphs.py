"""Replayed calls give what plain calls give, also between updates of the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fvgen.diffusion.predict import unet_predictor
from fvgen.distill.classifier import unet_trunk
from fvgen.distill.graphs import GraphedCall
from fvgen.types import Condition

from .small import SETTINGS, SHAPE, Latents, small_teacher, small_trainer


def test_without_a_gpu_it_is_the_call_itself() -> None:
    unet, batch = small_teacher().unet, Latents().read([0, 1])
    plain = unet_predictor(unet)
    x, t = torch.randn(2, *SHAPE), torch.tensor([999, 249])
    assert torch.equal(GraphedCall(unet, plain)(x, t, batch.condition), plain(x, t, batch.condition))


def _on_gpu(condition: Condition) -> Condition:
    latents, context, uncond, fps = (
        x.cuda() for x in (condition.latents, condition.context, condition.uncond_context, condition.fps)
    )
    return Condition(latents, context, uncond, fps)


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_values_and_gradients(frozen: bool) -> None:
    """Parameters' gradients add up over calls; a frozen network's gradient goes to its input."""
    unet = small_teacher().unet.cuda().requires_grad_(not frozen)
    call = unet_trunk(unet) if frozen else unet_predictor(unet)
    graphed = GraphedCall(unet, call)
    results: dict[str, list[torch.Tensor]] = {}
    for name, function in (("graphed", graphed), ("plain", call)):
        for p in unet.parameters():
            p.grad = None if p.grad is None else torch.zeros_like(p) if name == "plain" else p.grad.zero_()
        found = results.setdefault(name, [])
        torch.manual_seed(0)
        for step in range(3):
            condition = _on_gpu(Latents().read([2 * step, 2 * step + 1]).condition)
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
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_graphs_is_training_without(checkpointing: bool, tmp_path: Path) -> None:
    from fvgen.distill.parallel import Parallel

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


class GpuLatents(Latents):
    """The same clips on the GPU."""

    def read(self, indices):
        batch = super().read(indices)
        return replace(batch, clean=batch.clean.cuda(), condition=_on_gpu(batch.condition))
