"""DUSt3R: the network on two photos, and the global alignment of eight."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fvgen.bench.device import GpuWatch
from fvgen.bench.kernels import Say
from fvgen.bench.timing import Timing, inference, synchronize, time_calls, time_once
from fvgen.geometry.conventions import invert_rigid, rigid
from fvgen.geometry.dust3r.alignment import AlignmentState, Objective, optimise, pair_scales, pose_matrix, world_points
from fvgen.geometry.dust3r.pairs import PairPrediction, complete_pairs, float32_products
from fvgen.geometry.dust3r.pinhole import intrinsics, transform, unproject
from fvgen.geometry.dust3r.spanning_tree import aligned_scene, initial_state
from fvgen.geometry.se3 import so3_exp
from fvgen.models.dust3r import Dust3rNetwork
from fvgen.types import ImageSet

SIZE, PHOTOS, STEPS = (288, 512), 8, 300
QUICK_SIZE, QUICK_PHOTOS, QUICK_STEPS = (32, 48), 3, 60
QUICK_NETWORK: dict[str, Any] = {
    "encoder_width": 32,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_width": 16,
    "decoder_layers": 4,
    "decoder_heads": 2,
    "layer_widths": (8, 8, 8, 8),
    "feature_width": 8,
    "last_width": 8,
}
NOISE = 0.01  # of the depth


def measure_dust3r(device: str, rounds: int = 30, quick: bool = False, say: Say = lambda _: None) -> Iterator[dict[str, Any]]:
    """Records of the network on two photos (both orders in one batch) and of the alignment of eight photos (complete graph).

    The network has random weights of full size. Alignment counts from the predictions on the device to the scene on the CPU; its
    last loss is compared with that of as many plain Adam steps, one pair after the other, on the same predictions.

    Args:
        device: "cpu" or "cuda".
        rounds: readings per time of the network; a tenth of them for the alignment.
        quick: a tiny network, three small photos, 60 steps.
        say: told what is measured next.
    """
    yield from _network(device, rounds, quick, say)
    yield from _alignment(device, max(1, rounds // 10), quick, say)


def _network(device: str, rounds: int, quick: bool, say: Say) -> Iterator[dict[str, Any]]:
    say("DUSt3R, two photos")
    size = QUICK_SIZE if quick else SIZE
    with torch.random.fork_rng(devices=[device] if device != "cpu" else []):
        torch.manual_seed(0)
        with torch.device(device):  # drawn faster where it is needed
            network = Dust3rNetwork(**(QUICK_NETWORK if quick else {})).eval().requires_grad_(False)
            photos = torch.rand(2, 3, *size) * 2 - 1
    count = sum(p.numel() for p in network.parameters())
    facts = {"suite": "dust3r", "weights": "random weights", "parameters": count, "image_size": list(size), "pairs": 2}

    def call() -> Any:
        features = network.encode(photos)
        return network.decode(features, features.join([features[1:], features[:1]]))

    for name, dtype in (("tf32", torch.float32), ("", torch.bfloat16)):
        network.trunk_to(dtype)
        for graph in (False, True) if device != "cpu" else (False,):
            kind = "_".join(part for part in ("dust3r_pair", name, "graph" if graph else "", "ms") if part)
            with inference(), float32_products("high"), GpuWatch(device) as watch:
                timing = time_calls(call, device, rounds, graph=graph)
            peak = {"dtype": str(dtype).removeprefix("torch."), "peak_memory_bytes": watch.facts["peak_memory_bytes"]}
            yield {"name": kind, **facts, **peak, "unit": "ms", **timing.fields()}


def _alignment(device: str, rounds: int, quick: bool, say: Say) -> Iterator[dict[str, Any]]:
    size, count, steps = (QUICK_SIZE, QUICK_PHOTOS, QUICK_STEPS) if quick else (SIZE, PHOTOS, STEPS)
    predictions = noisy_predictions(count, size, device)
    images = ImageSet(torch.zeros(count, 3, *size))
    say(f"alignment of {count} photos, {len(predictions)} pairs")

    def call() -> Any:
        fresh = [replace(p) for p in predictions]  # a prediction keeps its score once it is known
        return aligned_scene(images, fresh, steps=steps)

    call()
    with GpuWatch(device) as watch:
        timing = Timing.of([time_once(call, device) for _ in range(rounds)], "perf_counter")
    start_ms, start = _timed(lambda: initial_state([replace(p) for p in predictions], count), device)
    objective = Objective(predictions)
    optimise_ms, (state, _) = _timed(lambda: optimise(start, objective, steps=steps), device)
    plain = PlainObjective(predictions)
    say("the same with plain Adam, one pair after the other")
    plain_ms, (plain_state, _) = _timed(lambda: optimise(start, plain, steps=steps, recorded=False), device)
    with torch.no_grad():
        losses = {"loss_at_the_start": start, "loss": state, "plain_loss": plain_state}
        told = {name: float(plain(each)) for name, each in losses.items()}
    facts = {"suite": "dust3r", "photos": count, "pairs": len(predictions), "image_size": list(size), "steps": steps}
    parts = {
        "start_s": 1e-3 * start_ms,
        "optimisation_s": 1e-3 * optimise_ms,
        "peak_memory_bytes": watch.facts["peak_memory_bytes"],
    }
    yield {"name": f"dust3r_align{count}_s", **facts, **parts, **told, "unit": "s", **timing.seconds()}
    yield {"name": f"dust3r_align{count}_plain_steps_s", **facts, "value": 1e-3 * plain_ms, "unit": "s", "count": 1}
    ratio = told["loss"] / told["plain_loss"]
    yield {"name": f"dust3r_align{count}_loss_vs_plain", **facts, "value": ratio, "unit": "of the plain loss"}


def _timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Milliseconds of a call, and its result."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start), result


class PlainObjective(Objective):
    """The loss as the paper states it: one pair after the other, with gradients by autograd."""

    def __init__(self, predictions: Sequence[PairPrediction]) -> None:
        self._predictions = predictions

    def __call__(self, state: AlignmentState) -> Tensor:
        world, poses, scales = world_points(state), pose_matrix(state.pair_poses), pair_scales(state.pair_poses)
        total = world.new_zeros(())
        for n, p in enumerate(self._predictions):
            for index, points, confidence in (
                (p.first, p.points_first, p.confidence_first),
                (p.second, p.points_second, p.confidence_second),
            ):
                moved = scales[n] * (points @ poses[n, :3, :3].T + poses[n, :3, 3])
                total = total + ((world[index] - moved).norm(dim=-1) * confidence.log()).mean()
        return total / len(self._predictions)


def noisy_predictions(count: int, size: tuple[int, int], device: str) -> list[PairPrediction]:
    """All pairs of a made-up scene: cameras on an arc, every pair with a unit of its own and noise of 1 % of the depth.

    Args:
        count: photos.
        size: (H, W) of them.
        device: where the predictions are.
    """
    generator = torch.Generator().manual_seed(0)
    angles = torch.linspace(-0.5, 0.5, count, dtype=torch.float64)
    turns = so3_exp(angles[:, None] * torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))
    pivot = torch.tensor([0.0, 0.0, 4.0], dtype=torch.float64)
    poses = rigid(turns, pivot - turns @ pivot)
    K = intrinsics(0.9 * max(size), size)
    coarse = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    depths = 3 + 2 * torch.nn.functional.interpolate(coarse, size=size, mode="bicubic", align_corners=True)[:, 0]
    points = [unproject(depth, K, pose).to(device) for depth, pose in zip(depths, poses, strict=True)]
    drawn = torch.Generator(device).manual_seed(0)
    predictions = []
    for i, j in complete_pairs(count):
        back, unit = invert_rigid(poses[i]), math.exp(0.3 * float(torch.randn((), generator=generator)))
        maps = []
        for n in (i, j):
            noise = NOISE * torch.randn(*size, 1, generator=drawn, device=device, dtype=torch.float64)
            maps.append((unit * (1 + noise) * transform(back, points[n])).float())
            maps.append(1 + torch.randn(size, generator=drawn, device=device).exp())
        predictions.append(PairPrediction(i, j, *maps))
    return predictions
