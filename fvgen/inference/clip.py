"""The whole clip on one GPU: renders in, frames out, recorded as one CUDA graph per shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fvgen.diffusion.predict import StepCallback
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.diffusion.timesteps import make_timesteps
from fvgen.inference.offload import FRAMES_AT_ONCE, VisitingTower
from fvgen.inference.towers import PackedImageTower
from fvgen.inference.unet import Keys, Shifts, UNetEngine
from fvgen.inference.vae import PackedVAE
from fvgen.kernels._triton import compile_side_by_side
from fvgen.models.bundle import ModelBundle
from fvgen.utils.device import lent


class Conditioned(NamedTuple):
    """What a clip's steps have in common.

    Attributes:
        latents: ``[B, C, T, h, w]`` of the renders.
        keys: of the context, see :meth:`UNetEngine.keys`.
    """

    latents: Tensor
    keys: Keys


class ClipEngine:
    """A model packed for inference: few-step sampling of clips of one batch, length and size after the other.

    Args:
        bundle: the model, on the device where it is to run unless ``offload``; weights are copied.
        dtype: of weights and activations.
        fast: every second step takes features from the step before, see :meth:`UNetEngine.with_lower`: the last step those of all
            resolutions but the highest, the others those of all layers but the last; quicker, and an approximation.
        offload: a device to run on with little memory. The bundle is on the CPU and stays there, but for the small embeddings of
            time; the packed image tower visits the device for each clip, and the VAE takes a few frames at a time. Without
            CUDA graphs of whole clips.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        dtype: torch.dtype = torch.bfloat16,
        fast: bool = False,
        offload: torch.device | str | None = None,
    ) -> None:
        self.dtype, self.fast, self.index = dtype, fast, bundle.index
        self.device = next(bundle.unet.parameters()).device if offload is None else torch.device(offload)
        self.offloaded = offload is not None
        with lent(bundle.unet, self.device):
            self.unet = UNetEngine(bundle.unet, dtype)
        with lent(bundle.vae, self.device):
            chunk = FRAMES_AT_ONCE if self.offloaded else None
            self.vae = PackedVAE(bundle.vae, dtype, chunk)
        self._scaling = float(bundle.vae.config.scaling_factor)
        with lent(bundle.image_encoder, self.device), lent(bundle.image_projector, self.device):
            self.tower: Callable[[Tensor], Tensor] = PackedImageTower(bundle.image_encoder, bundle.image_projector, dtype)
        if self.offloaded:
            bundle.unet.time_embedding.to(self.device)
            if bundle.unet.fps_embedding is not None:
                bundle.unet.fps_embedding.to(self.device)
            self.tower = VisitingTower(self.tower)
        self._prompt = bundle.prompt.to(self.device, dtype)
        self._schedule = NoiseSchedule.create(bundle.index.base_scale)
        self._shifts: dict[tuple[int, int, int], Shifts] = {}
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._prepared: set[tuple[int, ...]] = set()

    @torch.inference_mode()
    def prepare(self, shape: Sequence[int]) -> None:
        """On a GPU, compiles what clips need, if that has not been done; it would happen at the first clip, one after the other.

        Args:
            shape: ``[B, T, 3, H, W]`` of the renders.
        """
        if self.device.type == "cuda" and tuple(shape) not in self._prepared:
            self._prepared.add(tuple(shape))
            renders = torch.rand(tuple(shape), device=self.device)
            noise = torch.randn((2, *self.latent_shape(shape)), device=self.device)  # two steps launch every kernel
            compile_side_by_side(lambda: self(renders, noise))

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``[B, C, T, h, w]`` of the latents of renders ``[B, T, 3, H, W]``."""
        b, frames, _, height, width = shape
        return b, self.index.latent_channels, frames, height // self.vae.factor, width // self.vae.factor

    @torch.inference_mode()
    def __call__(self, renders: Tensor, noise: Tensor) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` float32 in [0, 1].

        Args:
            renders: ``[B, T, 3, H, W]`` in [0, 1], the first frame being the photo.
            noise: ``[S, B, C, T, h, w]`` float32 standard normal, one draw for each of S steps.
        """
        return self.decode(self.sample(self.condition(renders), noise))

    def condition(self, renders: Tensor) -> Conditioned:
        """Latents of the renders, and keys of the prompt and the first frame; see :meth:`__call__`. They run side by side."""
        pixels = 2 * renders - 1
        if self._side is None:
            return Conditioned(self._encode(pixels), self._keys(pixels))
        main = torch.cuda.current_stream(self.device)
        self._side.wait_stream(main)
        with torch.cuda.stream(self._side):
            keys = self._keys(pixels)
        latents = self._encode(pixels)
        main.wait_stream(self._side)
        return Conditioned(latents, keys)

    def sample(self, condition: Conditioned, noise: Tensor, callback: StepCallback | None = None) -> Tensor:
        """Clean latents ``[B, C, T, h, w]`` float32, as :func:`fvgen.diffusion.few_step.few_step_sample` defines them.

        Args:
            condition, noise: see :meth:`__call__`.
            callback: called with (steps done, steps, clean latents) after each step.
        """
        times = make_timesteps(len(noise))
        x, lower = noise[0], None
        for i, time in enumerate(times):
            a, b, s = self._rates(time)
            shifts = self.shifts(time, x.shape[0], x.shape[2])
            # of a pair of steps; the last step of all decides on the details
            left_out = 0 if i // 2 == (len(times) - 1) // 2 else self.unet.most_left_out
            v, lower = self.unet.with_lower(UNetEngine.stack(x, condition.latents), shifts, condition.keys, lower, left_out)
            lower = lower if self.fast and i % 2 == 0 else None  # what no step takes is not kept
            x0 = torch.add((a / s) * x, v, alpha=-b / s)
            if callback is not None:
                callback(i + 1, len(times), x0)
            if i + 1 < len(times):
                a, b, s = self._rates(times[i + 1])
                x = torch.add((a * s) * x0, noise[i + 1], alpha=b)
        return x0

    def decode(self, latents: Tensor) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` float32 in [0, 1] of latents ``[B, C, T, h, w]``."""
        flat = (latents / self._scaling).transpose(1, 2).flatten(0, 1)
        rgb = (self.vae.decode(flat) + 1) / 2
        return rgb.clamp_(0, 1).unflatten(0, (latents.shape[0], -1))

    def shifts(self, time: int, batch: int, frames: int) -> Shifts:
        """What a time step adds in the network's blocks; the same at every call, so it is kept."""
        key = (time, batch, frames)
        if key not in self._shifts:
            times = torch.full((batch,), time, device=self.device)
            self._shifts[key] = self.unet.shifts(times, torch.full_like(times, self.index.fps), frames)
        return self._shifts[key]

    def _rates(self, time: int) -> tuple[float, float, float]:
        abar = float(self._schedule.alphas_cumprod[time])
        return abar**0.5, (1 - abar) ** 0.5, float(self._schedule.scale[time])

    def _encode(self, pixels: Tensor) -> Tensor:
        mean, _ = self.vae.encode(pixels.flatten(0, 1)).chunk(2, dim=1)
        return (mean * self._scaling).unflatten(0, pixels.shape[:2]).transpose(1, 2)

    def _keys(self, pixels: Tensor) -> Keys:
        tokens = self.tower(pixels[:, 0])
        text = self._prompt.expand(tokens.shape[0], -1, -1)
        return self.unet.keys(torch.cat([text, tokens.to(text)], dim=1), pixels.shape[1])


class ClipGraph:
    """A recorded clip: another photo, camera or seed replays it.

    Args:
        engine: the model, on a CUDA device.
        shape: ``[B, T, 3, H, W]`` of the renders.
        steps: of the few-step sampler.

    Attributes:
        memory: bytes that the recording holds.
    """

    @torch.inference_mode()
    def __init__(self, engine: ClipEngine, shape: Sequence[int], steps: int = 4) -> None:
        device = engine.device
        engine.prepare(shape)
        self._renders = torch.rand(tuple(shape), device=device)
        self._noise = torch.randn((steps, *engine.latent_shape(shape)), device=device)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            engine(self._renders, self._noise)  # libraries choose their algorithms before the recording
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.empty_cache()  # the recording would do so too, and what it frees is not its own
        before = torch.cuda.memory_reserved(device)
        self._graph = torch.cuda.CUDAGraph()
        # other processes' NCCL has a thread that asks for its events meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._frames = engine(self._renders, self._noise)
        self.memory = torch.cuda.memory_reserved(device) - before

    @torch.inference_mode()
    def __call__(self, renders: Tensor, noise: Tensor) -> Tensor:
        """Frames ``[B, T, 3, H, W]``, valid until the next call; see :meth:`ClipEngine.__call__`."""
        self._renders.copy_(renders)
        self._noise.copy_(noise)
        self._graph.replay()
        return self._frames
