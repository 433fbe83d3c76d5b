"""The inference engine as the benchmark drives it: every stage and the whole clip as one CUDA graph each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fvgen.bench.replay import Replays
from fvgen.codec import LatentCodec
from fvgen.diffusion.ddim import ddim_rates
from fvgen.diffusion.guidance import combine
from fvgen.diffusion.noise import seeded_noise
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.diffusion.timesteps import make_timesteps
from fvgen.inference.clip import ClipEngine, ClipGraph, Conditioned
from fvgen.inference.unet import Keys, Shifts, UNetEngine
from fvgen.models.bundle import ModelBundle


class _Engine:
    """What student and teacher have in common.

    Args:
        bundle: the model, on its device; the engine works in bfloat16 on a GPU and in float32 elsewhere.
    """

    def __init__(self, bundle: ModelBundle) -> None:
        self.bundle = bundle
        self.device = next(bundle.unet.parameters()).device
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.engine = ClipEngine(bundle, self.dtype)
        self._codec = LatentCodec(bundle.vae)
        self._schedule = NoiseSchedule.create(bundle.index.base_scale)
        self._replays = Replays(self.device)

    def decode(self, latents: Tensor) -> Tensor:
        return self._replays("decode", self.engine.decode, latents)

    def _shape(self, renders: Tensor) -> tuple[int, ...]:
        """Shape of the latents of renders."""
        (b, frames, _, height, width), factor = renders.shape, self._codec.factor
        return b, self._codec.latent_channels, frames, height // factor, width // factor

    def _rates(self, time: int) -> tuple[float, float, float]:
        """a, b and s."""
        abar = float(self._schedule.alphas_cumprod[time])
        return abar**0.5, (1 - abar) ** 0.5, float(self._schedule.scale[time])


class EngineRunner(_Engine):
    """:class:`fvgen.inference.clip.ClipEngine`; its whole clip is a :class:`fvgen.inference.clip.ClipGraph`.

    Noise is drawn outside of the graphs, from the pipeline's seeded source.

    Args:
        bundle: the model, on its device.
        steps: network calls per clip.
    """

    label = "engine"

    def __init__(self, bundle: ModelBundle, steps: int = 4) -> None:
        super().__init__(bundle)
        self.steps = steps
        self._times = make_timesteps(steps, "trailing", len(self._schedule))
        self.release()

    def release(self) -> None:
        self._replays.release()
        self._clips: dict[torch.Size, ClipGraph] = {}
        self._noise: dict[tuple[int, ...], Tensor] = {}
        self.graph_memory: int | None = None

    @property
    def fast(self) -> bool | None:
        return self.engine.fast

    @fast.setter
    def fast(self, on: bool | None) -> None:
        self.engine.fast = bool(on)
        self.release()

    def encode(self, renders: Tensor) -> Conditioned:
        return self._replays("encode", self.engine.condition, renders)

    def encode_parts(self, renders: Tensor) -> dict[str, Callable[[], Any]]:
        engine, prompt = self.engine, self.bundle.prompt.to(self.dtype)
        scaling = self._codec.scaling_factor

        def latents(renders: Tensor) -> Tensor:
            mean, _ = engine.vae.encode((2 * renders - 1).flatten(0, 1)).chunk(2, dim=1)
            return (mean * scaling).unflatten(0, renders.shape[:2]).transpose(1, 2)

        def keys(renders: Tensor) -> Keys:
            tokens = engine.tower(2 * renders[:, 0] - 1)
            text = prompt.expand(tokens.shape[0], -1, -1)
            return engine.unet.keys(torch.cat([text, tokens.to(text)], dim=1), renders.shape[1])

        return {
            "vae_encode": lambda: self._replays("vae_encode", latents, renders),
            "image_tower": lambda: self._replays("image_tower", keys, renders),
        }

    @torch.inference_mode()
    def start(self, condition: Conditioned, seed: int) -> Tensor:
        shape = tuple(condition.latents.shape)
        drawn = self._draw(shape, seed)
        if shape not in self._noise:
            self._noise[shape] = torch.empty_like(drawn, device=self.device)
            for each in self._noise[shape]:
                self._replays.own(each)
        return self._noise[shape].copy_(drawn)[0]

    def forward(self, state: Tensor, number: int, condition: Conditioned) -> Tensor:
        return self._replays(f"forward {number}", partial(self._predict, number), state, condition)

    def step(self, state: Tensor, number: int, condition: Conditioned) -> Tensor:
        noise = self._noise[tuple(state.shape)]
        following = [] if number + 1 == self.steps else [noise[number + 1]]
        return self._replays(f"step {number}", partial(self._step, number), state, condition, *following)

    @torch.inference_mode()
    def clip(self, renders: Tensor, seed: int) -> Tensor:
        noise = self._draw(self._shape(renders), seed)
        if self.device.type != "cuda":
            return self.engine(renders, noise)
        if renders.shape not in self._clips:
            self._clips[renders.shape] = graph = ClipGraph(self.engine, renders.shape, self.steps)
            self.graph_memory = graph.memory
        return self._clips[renders.shape](renders, noise)

    def _draw(self, shape: tuple[int, ...], seed: int) -> Tensor:
        """``[S, B, C, T, h, w]``, one draw after the other as the sampler takes them."""
        draw = seeded_noise(seed, self.device)
        return torch.stack([draw(shape) for _ in range(self.steps)])

    def _predict(self, number: int, x: Tensor, condition: Conditioned) -> Tensor:
        shifts = self.engine.shifts(self._times[number], x.shape[0], x.shape[2])
        return self.engine.unet(UNetEngine.stack(x, condition.latents), shifts, condition.keys)

    def _step(self, number: int, x: Tensor, condition: Conditioned, *noise: Tensor) -> Tensor:
        a, b, s = self._rates(self._times[number])
        x0 = torch.add((a / s) * x, self._predict(number, x, condition), alpha=-b / s)
        if not noise:
            return x0
        a, b, s = self._rates(self._times[number + 1])
        return torch.add((a * s) * x0, noise[0], alpha=b)


class EngineTeacherRunner(_Engine):
    """Guided DDIM with the engine's network, both branches in one call of twice the batch.

    On a GPU one guided step is one CUDA graph, replayed for every step: what depends on the time is copied into it.

    Args:
        bundle: the model, on its device.
        steps: DDIM steps.
        guidance_scale: 1 switches guidance off.
    """

    label = "engine, DDIM"

    def __init__(self, bundle: ModelBundle, steps: int = 50, guidance_scale: float = 7.5) -> None:
        super().__init__(bundle)
        self.steps, self.guidance_scale = steps, guidance_scale
        with torch.inference_mode():  # the unconditional context is the same for every clip
            tokens = self.engine.tower(torch.zeros(1, 3, bundle.index.height, bundle.index.width, device=self.device))
            self._empty = torch.cat([bundle.empty.to(tokens)[None], tokens], dim=1)

    def release(self) -> None:
        """Forgets the recorded graphs."""
        self._replays.release()

    @torch.inference_mode()
    def clip(self, renders: Tensor, seed: int, steps: int | None = None) -> Tensor:
        """Frames ``[B, T, 3, H, W]`` from renders of that shape, both in [0, 1]; ``steps`` replaces those of the runner."""
        index = self.bundle.index
        times = make_timesteps(steps or self.steps, "trailing", len(self._schedule))
        shape = self._shape(renders)
        condition = self._replays("encode", self._condition, renders)
        branches = 1 if self.guidance_scale == 1.0 else 2
        draw = seeded_noise(seed, self.device)
        x = draw(shape)
        noise = torch.zeros_like(x)
        for time, following in zip(times, [*times[1:], 0], strict=True):
            rates = (*self._rates(time), *ddim_rates(self._schedule, time, following, index.eta))
            shifts = self.engine.shifts(time, branches * shape[0], shape[2])
            if rates[-1] > 0:
                noise = draw(shape)
            x = self._replays("step", self._step, x, noise, torch.tensor(rates), shifts, condition)
        return self._replays("decode", self.engine.decode, x)

    def _condition(self, renders: Tensor) -> Conditioned:
        """Latents once, keys of both branches."""
        condition = self.engine.condition(renders)
        if self.guidance_scale == 1.0:
            return condition
        b, frames = renders.shape[:2]
        other = self.engine.unet.keys(self._empty.expand(b, -1, -1), frames)
        keys: Keys = tree_map(lambda one, two: None if one is None else torch.cat([one, two]), condition.keys, other)
        return Conditioned(condition.latents, keys)

    def _step(self, x: Tensor, noise: Tensor, rates: Tensor, shifts: Shifts, condition: Conditioned) -> Tensor:
        a, b, s, signal, direction, sigma = rates.unbind(0)
        stacked = UNetEngine.stack(x, condition.latents)
        if self.guidance_scale == 1.0:
            v = self.engine.unet(stacked, shifts, condition.keys)
        else:
            both = self.engine.unet(torch.cat([stacked, stacked]), shifts, condition.keys)
            cond, uncond = both.chunk(2)
            v = combine(cond, uncond, self.guidance_scale, self.bundle.index.guidance_rescale)
        return signal * ((a * x - b * v) / s) + direction * (a * v + b * x) + sigma * noise
