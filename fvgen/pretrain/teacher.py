"""Trains the small video network, its image tower and projector on synthetic pairs, with the teacher's own denoising loss."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvgen.diffusion.parameterisation import add_noise, velocity
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.diffusion.timesteps import make_timesteps
from fvgen.models.spec import ModelSpec
from fvgen.pretrain.buffer import PairBuffer
from fvgen.pretrain.checkpoint import (
    load_state,
    module_tensors,
    optimiser_tensors,
    restore_module,
    restore_optimiser,
    save_state,
)
from fvgen.pretrain.common import Average, Budget, Log, Timer, learning_rate
from fvgen.pretrain.graphed import GradientStep
from fvgen.pretrain.networks import Networks
from fvgen.recipes.presets import get_preset
from fvgen.utils.errors import UserError

CHECKPOINT_FILE = "teacher_state.safetensors"


@dataclass(frozen=True)
class TeacherRecipe:
    """Settings of the network's run.

    Attributes:
        steps, minutes: end of the run, whichever comes first.
        batch: clips per step.
        refill_every, pairs: every so many steps, that many new clips; first_fill: clips made before the first step.
        buffer: clips kept.
        portrait_share: share of steps with height and width exchanged.
        short_share, short_frames: share of steps on clips thinned out to that many frames.
        student_share: share of time steps drawn from those the four-step sampler visits; the others are uniform.
        seed: of weights, worlds and noise.
    """

    steps: int = 20000
    minutes: float | None = None
    batch: int = 16
    refill_every: int = 8
    pairs: int = 8
    buffer: int = 8192
    first_fill: int = 128
    portrait_share: float = 0.25
    short_share: float = 0.25
    short_frames: tuple[int, ...] = (8, 12)
    student_share: float = 0.4
    peak_lr: float = 6e-4
    ema: float = 0.9995
    seed: int = 0


class TeacherRun:
    """The run between two steps; :meth:`save` and :meth:`restore` continue it bit for bit where the arithmetic repeats.

    Args: as for :func:`train_teacher`; ``vae`` is changed to evaluation on ``device``.
    """

    def __init__(
        self, recipe: TeacherRecipe, spec: ModelSpec, vae: nn.Module, prompt: Tensor, empty: Tensor, device: str, compile: bool
    ) -> None:
        index = spec.index
        self.recipe, self.device, self.frames = recipe, device, index.frames
        torch.manual_seed(recipe.seed)
        self.networks = Networks(spec, prompt, empty).to(device)
        self.average = Average(self.networks, recipe.ema)
        # Half-precision copy that computes; the float32 originals take the updates, which bfloat16 would round away.
        self._working = copy.deepcopy(self.networks).to(torch.bfloat16 if device == "cuda" else torch.float32)
        for master in self.networks.parameters():
            master.grad = torch.zeros_like(master)
        self._gradients = GradientStep(self._working, self._denoising_loss)
        self._optimiser = torch.optim.AdamW(
            self.networks.parameters(), lr=recipe.peak_lr, weight_decay=1e-3, betas=(0.9, 0.99), fused=device == "cuda"
        )
        self._schedule = NoiseSchedule.create(index.base_scale).to(device)
        self._student_times = torch.tensor(make_timesteps(4), device=device)
        vae = vae.to(device).to(memory_format=torch.channels_last).requires_grad_(False).eval()
        self.buffers = [
            PairBuffer(vae, s, index.frames, recipe.buffer // (1 + 3 * i), recipe.pairs, device, index.compositor, compile)
            for i, s in enumerate(index.sizes())
        ]
        self._generator = torch.Generator(device=device).manual_seed(recipe.seed)
        self._next_world, self.step = 2_000_000_000 * (1 + recipe.seed), 0

    def _denoising_loss(self, x: Tensor, v: Tensor, t: Tensor, render: Tensor, photo: Tensor, drop: Tensor) -> Tensor:
        return F.mse_loss(self._working(x, t, render, photo, drop).float(), v)

    def _clips(self) -> tuple[Tensor, Tensor, Tensor]:
        """Refills the buffer whose turn it is, where due, and draws from it; see :meth:`PairBuffer.draw`."""
        recipe, step = self.recipe, self.step
        # Orientations and lengths alternate in blocks of different length, so that every combination occurs.
        portrait = len(self.buffers) > 1 and (step // 9) % 20 < 20 * recipe.portrait_share
        buffer = self.buffers[int(portrait)]
        refills = -(-recipe.first_fill // recipe.pairs) if buffer.filled == 0 else int(step % recipe.refill_every == 0)
        for _ in range(refills):
            buffer.add(self._next_world)
            self._next_world += recipe.pairs
        target, render, photo = buffer.draw(recipe.batch, self._generator)
        if step % 20 < 20 * recipe.short_share:
            count = recipe.short_frames[step % len(recipe.short_frames)]
            keep = torch.linspace(0, self.frames - 1, count, device=self.device).round().long()
            target, render = target[:, :, keep], render[:, :, keep]
        return target, render, photo

    def _times(self) -> Tensor:
        """Time steps ``[B]``, partly those that the four-step sampler visits."""
        count, draw = self.recipe.batch, {"device": self.device, "generator": self._generator}
        t = torch.randint(len(self._schedule), (count,), **draw)
        use_student = torch.rand(count, **draw) < self.recipe.student_share
        pick = torch.randint(len(self._student_times), (count,), **draw)
        return torch.where(use_student, self._student_times[pick], t)

    def advance(self, fraction: float) -> tuple[Tensor, Tensor]:
        """One step at ``fraction`` of the run; returns the loss and the norm of the gradient."""
        target, render, photo = self._clips()
        noise = torch.randn(target.shape, device=self.device, generator=self._generator)
        t = self._times()
        drop = torch.rand(self.recipe.batch, device=self.device, generator=self._generator)
        x, v = add_noise(self._schedule, target, noise, t), velocity(self._schedule, target, noise, t)
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(fraction, self.recipe.peak_lr)
        loss = self._gradients(x, v, t, render, photo, drop)
        masters, copies = list(self.networks.parameters()), list(self._working.parameters())
        torch._foreach_copy_([p.grad for p in masters], [p.grad for p in copies])
        norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
        self._optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(copies, masters)
        self.average.update(self.networks)
        self.step += 1
        return loss, norm

    def save(self, path: Path, seconds: float) -> None:
        """Writes the state after ``seconds`` of training; clips are remembered by the numbers of their worlds."""
        tensors = {
            **module_tensors("networks", self.networks),
            **module_tensors("average", self.average.module),
            **optimiser_tensors(self._optimiser),
            "generator": self._generator.get_state(),
        }
        values = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "seconds": seconds,
            "next_world": self._next_world,
            "averaged": self.average.updates,
            "clips": [buffer.history() for buffer in self.buffers],
        }
        save_state(path, tensors, values)

    def restore(self, path: Path) -> float:
        """Takes over what :meth:`save` wrote and returns the seconds of training behind it; clips are rendered again.

        Raises:
            UserError: the file is damaged, or belongs to a run with other settings.
        """
        tensors, values = load_state(path)
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.recipe).items()}
        if values.get("recipe") != settings:
            raise UserError(f"{path} belongs to a run with other settings; give the same ones or delete it to start again")
        restore_module("networks", self.networks, tensors)
        restore_module("average", self.average.module, tensors)
        restore_optimiser(self._optimiser, tensors)
        with torch.no_grad():
            torch._foreach_copy_(list(self._working.parameters()), list(self.networks.parameters()))
        self._generator.set_state(tensors["generator"])
        self.step, self._next_world, self.average.updates = (values[k] for k in ("step", "next_world", "averaged"))
        for buffer, history in zip(self.buffers, values["clips"], strict=True):
            buffer.restore(history)
        return float(values["seconds"])


def train_teacher(
    recipe: TeacherRecipe,
    vae: nn.Module,
    prompt: Tensor,
    empty: Tensor,
    output: Path,
    device: str,
    compile: bool = False,
    *,
    spec: ModelSpec | None = None,
    checkpoint_minutes: float | None = None,
    resume: bool = False,
) -> Networks:
    """Trains and returns the averaged networks; writes ``output/teacher.jsonl``.

    Args:
        recipe: settings.
        vae: makes the latents; is frozen.
        prompt, empty: ``[77, D]`` text tokens.
        output: directory for log and state.
        device: "cpu" or "cuda".
        compile: fuse the ray caster with torch.compile.
        spec: the networks; None takes the preset ``tiny``.
        checkpoint_minutes: how often to write ``output/teacher_state.safetensors``; None never.
        resume: continue from that file if it is there. On the CPU, a run bounded by steps alone then ends with the same weights,
            bit for bit, as one that was never cut.

    Raises:
        UserError: the state to resume from is damaged or belongs to other settings.
    """
    run = TeacherRun(recipe, spec or get_preset("tiny"), vae, prompt, empty, device, compile)
    state = output / CHECKPOINT_FILE
    seconds = run.restore(state) if resume and state.is_file() else 0.0
    log, budget = Log(output, "teacher", run.step, seconds), Budget(recipe.steps, recipe.minutes, seconds)
    due = Timer(checkpoint_minutes)
    while (fraction := budget.fraction(run.step)) < 1:
        loss, norm = run.advance(fraction)
        if (run.step - 1) % 100 == 0:
            log.write(step=run.step - 1, loss=float(loss), gradient_norm=float(norm), worlds=run.buffers[0].filled)
        if due():
            run.save(state, budget.elapsed())
    log.write(step=run.step, worlds=run.buffers[0].filled)
    if checkpoint_minutes is not None:
        run.save(state, budget.elapsed())
    return run.average.module
