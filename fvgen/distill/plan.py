"""What a run is going to do and to need, without doing it: networks are only sketched, on PyTorch's meta device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fvgen.distill.classifier import ClassifierHead
from fvgen.distill.logs import PROGRESS, read_lines
from fvgen.distill.methods import Method
from fvgen.distill.settings import TrainSettings
from fvgen.distill.validation import CHUNK
from fvgen.models.bundle import build_component
from fvgen.models.spec import COMPONENTS, ModelSpec

_TRAINED = 4 + 4 + 8  # float32 weight, gradient and two moments


def memory_plan(
    spec: ModelSpec, method: Method, settings: TrainSettings, middle_channels: int, share: int, encodes: bool = True
) -> dict[str, float]:
    """Gigabytes on each GPU, by what they are for.

    Weights and optimisers are counted exactly. Activations are those that one forward call of the student keeps for its backward
    pass, in bfloat16 and with fused attention: an estimate.

    Args:
        spec: the teacher's networks.
        method: of the stage.
        settings: of the run.
        middle_channels: of the trunk's features.
        share: GPUs that hold one copy of the trained networks together.
        encodes: clips are rendered while training goes on, so that VAE and image branch stay on the GPU.
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
        "VAE, image branch": sum(map(_count, others)) * 4 if encodes else 0,
        "activations (estimate)": activation_bytes(unet, spec, settings.micro_batch, settings.checkpointing),
    }
    if settings.graphs and share == 1:  # autocast's, in the memory of calls with a gradient and in that of all others
        plan["weights in bfloat16"] = 2 * size * 2
    return {name: n / 1e9 for name, n in plan.items()}


def validation_bytes(spec: ModelSpec, encodes: bool) -> int:
    """What a validation needs beside what training holds: an estimate.

    VAE and image branch, unless they are on the GPU anyway. Then whichever is more: the student's weights in bfloat16, or of a
    chunk of frames in the VAE the four largest feature maps or the scores of its middle block before and after their softmax, in
    float32. The averaged weights take the place of the student's.
    """
    with torch.device("meta"):
        unet, *others = (build_component(name, getattr(spec, name)) for name in COMPONENTS)
    index, channels = spec.index, others[0].config.block_out_channels
    pixels = index.height * index.width
    maps, scores = 4 * max(channels[:2]) * pixels, 2 * (pixels // 4 ** (len(channels) - 1)) ** 2
    return (0 if encodes else sum(map(_count, others)) * 4) + max(2 * _count(unet), 4 * CHUNK * maps, 4 * CHUNK * scores)


class _Fused(TorchFunctionMode):
    """Attention keeps what the fused operators keep, not its scores."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _Attention.apply(*arguments[:3])
        return function(*arguments, **(options or {}))


class _Attention(torch.autograd.Function):
    """What attention keeps for its gradient, which is never taken."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, out.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


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
        scores = x.ndim == 4 and x.shape[-1] == x.shape[-2]  # of attention along time, which is fused too
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
    with _Fused(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        unet(x, t, context, t)
    outside, inside = kept.pop(-1, 0), kept.values()
    return outside + (inputs[0] + max(inside) if checkpointing else sum(inside))


def measured_speed(output: Path, stage: int) -> float | None:
    """Clips per second of the last part of this stage of a run; None where nothing was measured."""
    lines = [line for line in read_lines(output / PROGRESS) if line.get("stage") == stage]
    speeds = [speed for line in lines[-20:] if (speed := line.get("clips_per_second", 0.0)) > 0]
    return median(speeds) if speeds else None


def clips_left(method: Method, settings: TrainSettings, stage: int, state: dict[str, Any] | None) -> int:
    """Clips that the remaining updates of a stage use.

    Args:
        method: of the stage.
        settings: of the run.
        stage: its number.
        state: of the checkpoint that the run goes on from.
    """
    each, total = method.critic_updates + 1, settings.iterations[stage - 1]
    at, done = (0, 0) if state is None else (state["stage"], state["update"])
    updates = total * each if at < stage else total * each - done if at == stage else 0
    return max(0, updates) * settings.batch


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
