"""Distils the small teacher in every way the paper compares, and scores all students on the same held-out clips.

``python -m benchmarks.ablation OUTPUT`` trains and scores; an interrupted one goes on. ``benchmarks.ablation_report`` makes
the table and the plots of what several of them found.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fvgen import envs
from fvgen.bench.record import context, write_records
from fvgen.diffusion.ddim import ddim_sample
from fvgen.diffusion.few_step import few_step_sample
from fvgen.diffusion.noise import seeded_noise
from fvgen.diffusion.predict import PredictV, unet_predictor
from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill import checkpoint
from fvgen.distill.comparison import stage_iterations
from fvgen.distill.folder import CHECKPOINTS
from fvgen.distill.graphs import GraphedCall
from fvgen.distill.guards import TrainingStopped
from fvgen.distill.options import RunOptions
from fvgen.distill.parallel import Parallel
from fvgen.distill.run import distill
from fvgen.distill.settings import Cadence, TrainSettings, default_settings
from fvgen.distill.sources import Worlds
from fvgen.distill.synthetic import Reuse
from fvgen.distill.trainer import Trainer
from fvgen.evaluation.frechet import FrameFeatures
from fvgen.evaluation.heldout import clip_scores
from fvgen.evaluation.quality import HeldOutSet, Quality, Sample
from fvgen.evaluation.real_clips import RealClip, load_real_clip
from fvgen.inference.clip import ClipEngine
from fvgen.models.bundle import ModelBundle
from fvgen.pipeline import find_model
from fvgen.sampling import ModelSampler
from fvgen.types import Condition
from fvgen.utils.errors import UserError

# What is trained under each name, and whose first stage it goes on from.
ROWS: dict[str, tuple[str, tuple[int, ...], str | None]] = {
    "stage_one_only": ("stage_one_only", (1,), None),
    "fvgen": ("fvgen", (2,), "stage_one_only"),
    "reverse_kl": ("reverse_kl", (2,), "stage_one_only"),
    "no_stage_one": ("no_stage_one", (1,), None),
    "dmd2": ("dmd2", (1,), None),
    "causvid": ("causvid", (1, 2), None),
}
SCORES, CURVE = "scores.json", "curve.jsonl"
GUIDED = "teacher50_guidance_"  # and the scale: the teacher's row
RESCALE = 0.7  # of guided samples, as in ViewCrafter's sampler


class Ablation:
    """Teacher, clips and scores that all runs share.

    Args:
        bundle: the teacher's model; on ``parallel``'s device.
        output: one folder per run, and the scores.
        settings: what all runs have in common; method, stages, iterations and seed are set per run.
        iterations: of the first and of the second stage. A run with one stage of matching gets the second number, dmd2 both.
        clips: held-out clips for the scores; curve_clips: for the curves, every ``cadence.validate`` iterations.
        reuse: the synthetic clips, the same for all runs.
        real: real clips by name.
        student: a finished one, scored beside the teacher, or none.
        guidance: scales under which the teacher is also sampled in 50 steps, of two calls each.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        output: Path,
        settings: TrainSettings,
        iterations: tuple[int, int],
        clips: int,
        curve_clips: int,
        reuse: Reuse,
        cadence: Cadence,
        parallel: Parallel,
        real: dict[str, RealClip],
        student: ModelBundle | None = None,
        guidance: Sequence[float] = (),
    ) -> None:
        self._bundle, self._output, self._settings, self._iterations = bundle, output, settings, iterations
        self._curve_clips, self._reuse, self._cadence, self._parallel, self._real = curve_clips, reuse, cadence, parallel, real
        self._student, self._guidance = student, guidance
        self._compile = parallel.device.type == "cuda"
        self._worlds: Worlds = {}
        self._schedule = NoiseSchedule.create(bundle.index.base_scale)
        self._held_out = HeldOutSet(bundle, clips, min(8, clips), FrameFeatures(bundle.vae), self._compile)
        output.mkdir(parents=True, exist_ok=True)
        path = output / SCORES
        self._scores: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []

    def baselines(self) -> None:
        """The teacher at 4 and 50 DDIM steps and under the student's sampler, the finished student, the truth through the VAE."""
        predict, index = self._predictor(self._bundle.unet), self._bundle.index

        def ddim(steps: int, scale: float = 1.0) -> Sample:
            def way(condition: Condition, seed: int) -> Tensor:
                noise = seeded_noise(seed, condition.latents.device)
                rest = (noise, steps, index.eta, scale, 0.0 if scale == 1 else RESCALE)
                return ddim_sample(predict, self._schedule, condition, condition.latents.shape, *rest)

            return way

        ways = {"teacher4": ddim(4), "teacher50": ddim(50), "untrained": self._few_step(predict)}
        ways |= {guided_row(scale): ddim(50, scale) for scale in self._guidance}
        if self._student is not None:
            ways |= {"student": self._with_engine(self._student, False), "fast": self._with_engine(self._student, True)}
        for name, way in ways.items():
            if not self._done(name, 0):
                self._add(name, 0, self._held_out.score(way), self._on_real(way))
        if not self._done("vae", 0):
            codec = self._held_out.codec

            def through_vae(_condition: Any, _seed: int, truth: Tensor) -> Tensor:
                ends = (0, 0, 0, 0, 0, 0, 1, 1)  # the photos, which are not scored
                return codec.decode(codec.encode(nn.functional.pad(truth.float() / 255, ends)))

            self._add("vae", 0, self._held_out.score_frames(through_vae), {})

    def run(self, row: str, seed: int) -> None:
        """Trains one student and scores it, unless that has been done."""
        if self._done(row, seed):
            return
        name, stages, before = ROWS[row]
        if before is not None:
            self.run(before, seed)
        iterations = stage_iterations(name, self._iterations)
        settings = replace(self._settings, run=name, stages=stages, iterations=iterations, seed=seed)
        folder = self._output / f"{row}-{seed}"
        start = None if before is None else self._output / f"{before}-{seed}"
        options = RunOptions(folder, "tiny_teacher", start=start, cadence=self._cadence, reuse=self._reuse, compile=self._compile)
        stopped = ""
        try:
            distill(settings, options, self._bundle, self._parallel, worlds=self._worlds, validate=self._curve(folder))
        except TrainingStopped as reason:
            stopped = str(reason)
        found = checkpoint.latest(folder / CHECKPOINTS)
        assert found is not None
        student = copy.deepcopy(self._bundle.unet).float().eval()
        checkpoint.restore(checkpoint.module_tensors(student), checkpoint.read_tensors(found, "ema"), "student")
        way = self._few_step(self._predictor(student.to(self._parallel.device)))
        facts = {"iterations": list(iterations), "checkpoint": found.name, "lr": settings.lr, "batch": settings.batch}
        facts |= {"stopped": stopped} if stopped else {}
        self._add(row, seed, self._held_out.score(way), self._on_real(way), facts)

    def _curve(self, folder: Path) -> Callable[[Trainer, str], dict[str, float]]:
        def judge(trainer: Trainer, name: str) -> dict[str, float]:
            with trainer.average.applied():
                found = self._held_out.score(self._few_step(trainer.roles.sampler), self._curve_clips)
            line = {"stage": trainer.stage, "iteration": trainer.iteration, **asdict(found)}
            with (folder / CURVE).open("a") as file:
                file.write(json.dumps(line) + "\n")
            return {"psnr": found.psnr, "frechet": found.frechet}

        return judge

    def _predictor(self, unet: nn.Module) -> PredictV:
        precision = torch.bfloat16 if self._parallel.device.type == "cuda" else None
        return GraphedCall(unet, unet_predictor(unet, precision))

    def _with_engine(self, bundle: ModelBundle, fast: bool) -> Sample:
        dtype = torch.bfloat16 if self._parallel.device.type == "cuda" else torch.float32
        engine = ClipEngine(bundle, dtype, fast)
        return lambda condition, seed: ModelSampler(bundle, seed, engine=engine).few_step(condition)

    def _few_step(self, predict: PredictV) -> Sample:
        def way(condition: Condition, seed: int) -> Tensor:
            noise = seeded_noise(seed, condition.latents.device)
            return few_step_sample(predict, self._schedule, condition, condition.latents.shape, noise)

        return way

    @torch.no_grad()
    def _on_real(self, way: Sample) -> dict[str, float]:
        scores = {}
        for name, clip in self._real.items():
            video = self._held_out.codec.decode(way(self._held_out.conditioner(clip.renders.rgb[None], guidance=True), 0))
            scores[name] = clip_scores(name, video, clip.truth[None], clip.renders.coverage[None])[name][0]
        return scores

    def _done(self, row: str, seed: int) -> bool:
        return any(s["row"] == row and s["seed"] == seed for s in self._scores)

    def _add(self, row: str, seed: int, found: Quality, real: dict[str, float], facts: dict[str, Any] | None = None) -> None:
        self._scores.append({"row": row, "seed": seed, **asdict(found), "real_psnr": real, **(facts or {})})
        write_records(self._output / SCORES, self._scores)
        print(
            f"{row:16} seed {seed}  {found.psnr:6.2f} dB  SSIM {found.ssim:.4f}  Frechet {found.frechet:.4f}  {real}", flush=True
        )


def guided_row(scale: float) -> str:
    """Row of the teacher under guidance."""
    return f"{GUIDED}{scale:g}"


def parse_run(text: str) -> tuple[str, int]:
    """Row and seed of "fvgen:0".

    Raises:
        UserError: it is something else.
    """
    row, _, seed = text.partition(":")
    if row not in ROWS or not seed.isdecimal():
        raise UserError(f"a run is a row and a seed, like fvgen:0, not {text!r}; rows are {', '.join(ROWS)}")
    return row, int(seed)


def command_of(arguments: Sequence[str]) -> str:
    """The command to repeat a measurement, without places on this machine."""
    return shlex.join(["python", "-m", "benchmarks.ablation", *(Path(word).name or word for word in arguments)])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--teacher", default="tiny_teacher", help="model directory, or the bundled tiny_teacher")
    parser.add_argument("--student", default="tiny", help="a finished one to score too, also in fast mode")
    everything = [f"{row}:{seed}" for seed in range(3) for row in ROWS]
    parser.add_argument("--runs", nargs="*", default=everything, metavar="ROW:SEED", help="default: every row, seeds 0 to 2")
    parser.add_argument("--no-baselines", action="store_true", help="leave the teacher's scores to another folder")
    parser.add_argument("--guidance", nargs="+", type=float, default=[], metavar="W", help="score the teacher under these, too")
    parser.add_argument("--iterations", nargs=2, type=int, help="default: the recipe's", metavar=("STAGE1", "STAGE2"))
    parser.add_argument("--lr", type=float, help="learning rate of the student")
    parser.add_argument("--fake-lr", type=float, help="of the fake score")
    parser.add_argument("--head-lr", type=float, help="of the classifier's head")
    parser.add_argument("--lead", type=int, help="iterations in which only the critics learn")
    parser.add_argument("--warmup", type=int, help="iterations over which the rates rise")
    parser.add_argument("--critic-updates", type=int, help="per update of the student")
    parser.add_argument("--clips", type=int, default=256, help="held-out clips that are scored")
    parser.add_argument("--curve-clips", type=int, default=32)
    parser.add_argument("--curve-every", type=int, default=50, metavar="ITERATIONS")
    parser.add_argument("--window", type=int, default=2048, help="synthetic clips that all runs train on")
    parser.add_argument("--trajectories", type=int, default=256, help="of the teacher, for causvid")
    parser.add_argument("--real", nargs=3, action="append", default=[], metavar=("SCENE", "FIRST", "LAST"))
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    envs.repeatable_cublas()
    parallel = Parallel.start(options.device)
    device = parallel.device
    try:
        runs = [parse_run(text) for text in options.runs]
        bundle = ModelBundle.from_pretrained(find_model(options.teacher)).to(device)
        index = bundle.index
        real = {
            f"{Path(scene).name} {first}-{last}": load_real_clip(
                scene, int(first), int(last), index.sizes(), index.compositor, str(device)
            )
            for scene, first, last in options.real
        }
        names = ("lr", "fake_lr", "head_lr", "lead", "warmup", "critic_updates", "trajectories")
        changes = {name: getattr(options, name) for name in names}
        settings = replace(default_settings("tiny"), **{k: v for k, v in changes.items() if v is not None}, repeatable=False)
        ablation = Ablation(
            bundle,
            options.output,
            settings,
            tuple(options.iterations or settings.iterations),
            options.clips,
            options.curve_clips,
            Reuse(options.window, 10**9, 32, 0.0),  # never moves on: the same landscape clips for all
            Cadence(log=25, checkpoint=100, keep=1, validate=options.curve_every),
            parallel,
            real,
            None if options.no_baselines else ModelBundle.from_pretrained(find_model(options.student)).to(device),
            options.guidance,
        )
        command = command_of(sys.argv[1:] if arguments is None else arguments)
        write_records(options.output / "context.json", [{"name": "context", **context(command)}])
        if not options.no_baselines:
            ablation.baselines()
        for row, seed in runs:
            ablation.run(row, seed)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
