"""The training loop: critic updates, then one student update, over and over.

Which clips an update sees and which random numbers it draws follow from the seed of the run and the number of the update. So of
them nothing has to be stored but that number, and a run that was killed goes on with the same losses.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.distill import checkpoint
from fvgen.distill.data import Order, Source
from fvgen.distill.ema import WeightAverage
from fvgen.distill.guards import Guards
from fvgen.distill.logs import History, RunLog
from fvgen.distill.methods import Method
from fvgen.distill.networks import Batch, Draws, derived_seed
from fvgen.distill.optimiser import NetworkOptimiser
from fvgen.distill.parallel import Parallel
from fvgen.distill.prefetch import Prefetcher
from fvgen.distill.roles import Roles
from fvgen.distill.settings import Cadence, TrainSettings
from fvgen.distill.weight_mean import WeightMean


@dataclass
class Position:
    """Where a stage is.

    Attributes:
        update: updates done, of critics and student together.
        samples: clips used by the run, earlier stages included.
    """

    update: int = 0
    samples: int = 0


class Trainer:
    """One stage of a run.

    Args:
        stage: its number, from 1.
        method: what an update computes.
        roles: the networks.
        source: the clips.
        settings: of the run.
        cadence: how often what happens.
        parallel: this process among the ranks.
        folder: of the checkpoints.
        log: where the statistics go.
        describe: what every checkpoint says about the run (plain JSON).
        guards: what stops the run.
        validate: called with the student and a name, on all ranks; returns figures for the log.
        samples: clips used by earlier stages.
    """

    def __init__(
        self,
        stage: int,
        method: Method,
        roles: Roles,
        source: Source,
        settings: TrainSettings,
        cadence: Cadence,
        parallel: Parallel,
        folder: Path,
        log: RunLog,
        describe: dict[str, Any] | None = None,
        guards: Guards | None = None,
        validate: Callable[[Trainer, str], dict[str, float]] | None = None,
        samples: int = 0,
    ) -> None:
        self.stage, self.method, self.roles, self.settings = stage, method, roles, settings
        self._cadence, self._parallel, self._folder, self._log = cadence, parallel, folder, log
        self._describe, self._guards, self._validate = describe or {}, guards or Guards(), validate
        self._source, self._order = source, Order(source.count, settings.seed)
        self.position = Position(samples=samples)
        self._optimisers = {name: NetworkOptimiser(module, settings, parallel) for name, module in roles.trained.items()}
        self.average = WeightAverage(roles.trained["student"], settings.ema)
        self._history = History()
        self._calls = settings.calls(parallel.world)  # forward calls of this rank per update
        self._batches: Prefetcher | None = None
        self._fetched_at = (time.monotonic(), 0)
        self._saved_at = time.monotonic()

    @property
    def weight_mean(self) -> WeightMean | None:
        """The running mean of the weights, where the method keeps one."""
        return getattr(self.method, "weight_mean", None)

    @property
    def iteration(self) -> int:
        """Student updates done."""
        return self.position.update // (self.method.critic_updates + 1)

    @property
    def phase(self) -> int:
        """Updates done within the iteration: the critics' come first, then the student's."""
        return self.position.update % (self.method.critic_updates + 1)

    def run(self, iterations: int, deadline: float | None = None) -> bool:
        """Trains up to that many iterations; False when it was ended by the deadline (``time.monotonic()``) before.

        Raises:
            TrainingStopped: a guard objected. The last checkpoint is from before that.
        """
        cadence = self._cadence
        self._log.begin(self.stage, self.position.update, self.iteration, iterations)
        if self.position.update == 0:
            self.save()  # whatever happens, there is something to go on from, and the disk can be written
        try:
            self._start_data()
            while self.iteration < iterations:
                self.advance()
                if self.phase:
                    continue
                self._log.tick()
                at, last = self.iteration, self.iteration == iterations
                save = at % cadence.checkpoint == 0 or last
                over = False
                if at % cadence.log == 0 or last:
                    self.collect()
                    now = time.monotonic()
                    over = self._parallel.agree(deadline is not None and now > deadline) and not last
                    save |= over or self._parallel.agree(now - self._saved_at > 60 * cadence.minutes)
                if save:
                    self.save()
                if over:
                    return False
                if self._validate is not None and cadence.validate and (at % cadence.validate == 0 or last):
                    figures = self._validate(self, f"stage{self.stage}-{at:06d}")
                    self._log.scalars({f"stage{self.stage}/{k}": v for k, v in figures.items()}, at)
            return True
        finally:
            self.close()

    def advance(self) -> None:
        """One update, of the critics or of the student, whichever is due."""
        self._start_data()
        settings, parallel = self.settings, self._parallel
        student = self.phase == self.method.critic_updates
        step = self.method.student_update if student else self.method.critic_update
        # of all networks: the student's loss also reaches the head
        for optimiser in self._optimisers.values():
            optimiser.zero()
        rows, samples, trained = [], [], ()
        for call in range(self._calls):
            batch = next(self._batches)  # type: ignore[arg-type]
            update = step(self.roles.networks, batch, self._draws(parallel.rank * self._calls + call))
            (update.total / self._calls).backward()
            rows.append(update.statistics)
            samples.append(update.samples)
            trained = tuple(update.losses)
        statistics = dict(rows[0])
        if len(rows) > 1:
            statistics = {name: torch.stack([row[name] for row in rows]).mean() for name in statistics}
        for name in trained:
            rate = settings.rate(name, self.iteration, alone=not self.method.critic_updates)
            statistics[f"{name}_gradient"] = self._optimisers[name].step(rate)
        if student:
            self.average.update()
        where = {
            "stage": self.stage,
            "iteration": self.iteration,
            "step": self.position.update,
            "update": "student" if student else "critic",
        }
        self._history.add(where, statistics, samples)
        self.position.update += 1
        self.position.samples += settings.batch

    def collect(self) -> None:
        """Fetches the statistics, writes them and lets the guards judge them."""
        records, samples = self._history.collect(self._parallel)
        if not records:
            return
        now, (before, used) = time.monotonic(), self._fetched_at
        facts = {"clips_per_second": (self.position.samples - used) / (now - before) if used else 0.0}
        self._fetched_at = (now, self.position.samples)
        if self._parallel.device.type == "cuda":
            facts["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._parallel.device) / 1e9
        self._log.write(records, facts)
        self._guards.check(records)
        self._log.histograms(records[-1], samples, facts)

    def save(self) -> Path:
        """A checkpoint of this moment, once the guards have seen all before it."""
        self.collect()
        name = f"stage{self.stage}-{self.iteration:06d}" + (f"-{self.phase}" if self.phase else "")
        files: dict[str, dict[str, Tensor]] = {"ema": self.average.tensors}
        for role, module in self.roles.trained.items():
            files[role] = checkpoint.module_tensors(module)
            files[f"{role}-adamw"] = self._optimisers[role].tensors()
        files["random"] = {"cpu": torch.get_rng_state()}
        if self._parallel.device.type == "cuda":
            files["random"]["cuda"] = torch.cuda.get_rng_state(self._parallel.device)
        mean = self.weight_mean
        if mean is not None and mean.value is not None:
            files["weight_mean"] = {"value": mean.value}
        state = {
            **self._describe,
            "stage": self.stage,
            "update": self.position.update,
            "iteration": self.iteration,
            "phase": self.phase,
            "samples": self.position.samples,
            "averaged": self.average.updates,
            "trained": list(self.roles.trained),
            "files": sorted(files),
        }
        checkpoint.save(self._folder, name, files, state, self._cadence.keep, self._parallel)
        self._saved_at = time.monotonic()
        return self._folder / name

    def restore(self, path: Path) -> None:
        """Goes on where the checkpoint ``path`` of this stage was taken, on any number of ranks.

        Raises:
            UserError: it is of other networks, or damaged.
        """
        state = checkpoint.read_state(path)
        for role, module in self.roles.trained.items():
            checkpoint.restore(checkpoint.module_tensors(module), checkpoint.read_tensors(path, role), role)
            self._optimisers[role].restore(checkpoint.read_tensors(path, f"{role}-adamw"))
        checkpoint.restore(self.average.tensors, checkpoint.read_tensors(path, "ema"), "running average")
        self.average.updates = state["averaged"]
        self.position = Position(state["update"], state["samples"])
        mean = self.weight_mean
        if mean is not None and "weight_mean" in state["files"]:
            mean.value = checkpoint.read_tensors(path, "weight_mean")["value"].to(self._parallel.device)
        if self._parallel.main:  # no method draws from these; a network with dropout would
            random = checkpoint.read_tensors(path, "random")
            torch.set_rng_state(random["cpu"])
            if self._parallel.device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], self._parallel.device)

    def close(self) -> None:
        """Ends the thread that prepares the batches."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _draws(self, lane: int) -> Draws:
        """The random numbers of one forward call of this update; ``lane`` counts those of all ranks."""
        seed, update = self.settings.seed, self.position.update
        shared = derived_seed(seed, "shared", self.stage, update)
        return Draws(shared, derived_seed(seed, "own", self.stage, update, lane))

    def _start_data(self) -> None:
        if self._batches is not None:
            return
        settings, start, rank = self.settings, self.position.samples, self._parallel.rank

        def read(number: int) -> Batch:
            update, call = divmod(number, self._calls)
            first = start + update * settings.batch + (rank * self._calls + call) * settings.micro_batch
            return self._source.read(self._order.indices(first, settings.micro_batch))

        self._batches = Prefetcher(read, 0, self._parallel.device)
