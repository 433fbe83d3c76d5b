"""What a run is going to do and to need, without doing it: networks are only sketched, on PyTorch's meta device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fvgen.distill.classifier import ClassifierHead
from fvgen.distill.logs import PROGRESS
from fvgen.distill.methods import Method
from fvgen.distill.settings import TrainSettings
from fvgen.models.bundle import build_component
from fvgen.models.spec import ModelSpec

_TRAINED = 4 + 4 + 8  # float32 weight, gradient and two moments


def memory_plan(spec: ModelSpec, method: Method, settings: TrainSettings, middle_channels: int, share: int) -> dict[str, float]:
    """Gigabytes on each GPU, by what they are for.

    Weights and optimisers are counted exactly. Activations are those that one forward call of the student keeps for its backward
    pass, in bfloat16 and with fused attention: an estimate.

    Args:
        spec: the teacher's networks.
        method: of the stage.
        settings: of the run.
        middle_channels: of the trunk's features.
        share: GPUs that hold one copy of the trained networks together. Calls are recorded only where this is 1.
    """
    with torch.device("meta"):
        unet, head = build_component("unet", spec.unet), ClassifierHead(replace(settings.head, in_channels=middle_channels))
        others = [build_component(name, getattr(spec, name)) for name in ("vae", "image_encoder", "image_projector")]
    size, copies = _count(unet), sum(name != "head" for name in method.trained)
    plan = {
        "student, fake score": copies * size * _TRAINED / share,
        "running average": size * 4 / share,
        "head": _count(head) * _TRAINED if "head" in method.trained else 0,
        "teacher": size * (2 if settings.teacher_dtype == "bfloat16" else 4),
        "VAE, image branch": sum(map(_count, others)) * 4,
        "activations (estimate)": activation_bytes(unet, spec, settings.micro_batch, settings.checkpointing),
    }
    if settings.graphs and share == 1:  # autocast's, in the memory of calls with a gradient and in that of all others
        plan["weights in bfloat16"] = 2 * size * 2
    return {name: n / 1e9 for name, n in plan.items()}


def activation_bytes(unet: nn.Module, spec: ModelSpec, batch: int, checkpointing: bool) -> int:
    """What a forward call on ``batch`` clips keeps for its backward pass, in bfloat16.

    With checkpointing: the inputs of all layers, and all that the largest of them keeps.
    """
    index = spec.index
    unet = nn.Module.to(unet, device="meta", dtype=torch.bfloat16)
    layers = [m for m in unet.modules() if type(m).__name__ in unet._no_split_modules]
    current: list[int] = [-1]  # of the layer that runs; -1 outside of all
    kept: dict[int, int] = {}
    inputs, seen = [0], set()

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        scores = x.ndim == 4 and x.shape[-1] == x.shape[-2]  # fused attention never stores them
        if not isinstance(x, nn.Parameter) and not scores and storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(x)
            kept[current[0]] = kept.get(current[0], 0) + storage.nbytes()
        return x

    alive: list[Tensor] = []
    for number, layer in enumerate(layers):

        def enter(_module: nn.Module, arguments: tuple[Any, ...], number: int = number) -> None:
            current[0] = number
            inputs[0] += arguments[0].nbytes

        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(lambda *_: current.__setitem__(0, -1))
    h, w = index.height // 8, index.width // 8
    options: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    x = torch.empty(batch, unet.config.in_channels, index.frames, h, w, **options)
    context = torch.empty(batch, unet.config.text_tokens + 16 * unet.config.temporal_length, unet.config.context_dim, **options)
    t = torch.empty(batch, device="meta", dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        unet(x, t, context, t)
    outside, inside = kept.pop(-1, 0), kept.values()
    return outside + (inputs[0] + max(inside) if checkpointing else sum(inside))


def measured_speed(output: Path) -> float | None:
    """Clips per second of an earlier part of this run; None where nothing was measured."""
    path = output / PROGRESS
    if not path.is_file():
        return None
    speeds = [json.loads(line).get("clips_per_second", 0.0) for line in path.read_text().splitlines() if line.endswith("}")]
    speeds = sorted(s for s in speeds[-20:] if s > 0)
    return speeds[len(speeds) // 2] if speeds else None


def clips_needed(method: Method, iterations: int, batch: int) -> int:
    """Clips that the updates of a stage use."""
    return iterations * (method.critic_updates + 1) * batch


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
