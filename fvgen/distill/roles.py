"""The networks of a method: copies of the teacher where it says so, in the precision and layout of the run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fvgen import envs
from fvgen.diffusion.predict import PredictV, unet_predictor
from fvgen.distill.checkpoint import module_tensors, restore
from fvgen.distill.classifier import ClassifierHead, unet_trunk
from fvgen.distill.graphs import GraphedCall, Pools
from fvgen.distill.methods import Method
from fvgen.distill.networks import Networks, derived_seed
from fvgen.distill.parallel import Parallel
from fvgen.distill.settings import TrainSettings
from fvgen.models.bundle import ModelBundle
from fvgen.models.unet import VideoUNet


@dataclass(frozen=True)
class Roles:
    """The networks of one stage.

    Attributes:
        networks: as the method calls them.
        trained: the modules that it trains, by name, the student first; float32.
        sampler, teacher: student and teacher for other shapes and threads than those of the updates.
    """

    networks: Networks
    trained: dict[str, nn.Module]
    sampler: PredictV
    teacher: PredictV


def middle_channels(unet: VideoUNet) -> int:
    """Channels of the features that the classifier looks at."""
    config = unet.config
    return round(config.model_channels * config.channel_mult[-1])


def build_roles(
    bundle: ModelBundle,
    method: Method,
    settings: TrainSettings,
    parallel: Parallel,
    start: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Roles:
    """Student and fake score as copies of the teacher, a fresh head, and the frozen teacher itself.

    Args:
        bundle: the teacher's model, anywhere; its UNet stays as it is.
        method: says which networks are trained.
        settings: precision, graphs and checkpointing.
        parallel: devices and layout.
        start: full tensors of networks that do not start from the teacher, for example ``{"student": ..., "head": ...}``.
    """
    device = parallel.device
    autocast = torch.bfloat16 if device.type == "cuda" else None
    # where activations have their channels last, convolutions would rearrange other weights at each call
    fused = device.type == "cuda" and envs.kernels_mode() != "reference"
    layout: dict[str, Any] = {"memory_format": torch.channels_last} if fused else {}
    dtype = getattr(torch, settings.teacher_dtype) if device.type == "cuda" else torch.float32
    # whole on every rank, since its trunk is called without its outermost ``forward``
    teacher = nn.Module.to(copy.deepcopy(bundle.unet), device=device, dtype=dtype, **layout).requires_grad_(False).eval()
    trained: dict[str, nn.Module] = {}
    drops = bool(bundle.unet.config.dropout)
    for name in method.trained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(settings.seed, name) % 2**63)
            module = _head(bundle, settings) if name == "head" else copy.deepcopy(bundle.unet).float()
        plain = name == "head" or parallel.mesh is not None  # FSDP2 cuts tensors in their usual order only
        module = nn.Module.to(module, device=device, **({} if plain else layout)).requires_grad_(True).train()
        if settings.checkpointing and name != "head":
            # the state of the random generators is copied for every layer only where one draws from them
            recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=drops)
            module.enable_gradient_checkpointing(recompute)
        if start and name in start:
            restore(module_tensors(module), start[name], name)
        trained[name] = parallel.share(module, autocast) if name != "head" else module
    graphs, pools = settings.graphs and device.type == "cuda", Pools()

    def call(module: nn.Module, function: PredictV) -> PredictV:
        # the state of a random generator cannot be read while a graph is recorded
        return GraphedCall(module, function, pools, gradients=not (settings.checkpointing and drops)) if graphs else function

    student = trained["student"]
    networks = Networks(
        student=call(student, unet_predictor(student, autocast)),
        teacher=call(teacher, unet_predictor(teacher, autocast)),
        fake=call(trained["fake"], unet_predictor(trained["fake"], autocast)) if "fake" in trained else None,
        trunk=call(teacher, unet_trunk(teacher, autocast)) if "head" in trained else None,
        head=trained.get("head"),
    )
    return Roles(networks, trained, unet_predictor(student, autocast), unet_predictor(teacher, autocast))


def _head(bundle: ModelBundle, settings: TrainSettings) -> ClassifierHead:
    return ClassifierHead(replace(settings.head, in_channels=middle_channels(bundle.unet)))
