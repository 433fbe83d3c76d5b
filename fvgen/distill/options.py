"""Where a run is, how long it lasts, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvgen.distill.settings import Cadence, TrainSettings
from fvgen.distill.synthetic import Reuse


@dataclass(frozen=True)
class RunOptions:
    """What a run needs beyond its settings; none of it changes what is computed.

    Attributes:
        output: folder of the run; an earlier run in it is continued.
        teacher: name or folder of the teacher, for the record.
        data: "synthetic" or a folder of shards.
        start: a run or a checkpoint whose student and head the first trained stage starts from.
        cadence: how often what happens.
        minutes: end this call after so long, with a checkpoint; None for no limit.
        validation_clips: held-out clips.
        reuse: of synthetic clips; it does change which clips are seen, and is recorded.
        wandb: log to Weights & Biases too.
        compile: fuse the ray caster of the synthetic world with torch.compile.
    """

    output: Path
    teacher: str
    data: str = "synthetic"
    start: Path | None = None
    cadence: Cadence = field(default_factory=Cadence)
    minutes: float | None = None
    validation_clips: int = 4
    reuse: Reuse = field(default_factory=Reuse)
    wandb: bool = False
    compile: bool = False

    def record(self, settings: TrainSettings) -> dict[str, Any]:
        """What a continued run must agree with."""
        return {
            "settings": settings.to_dict(),
            "teacher": self.teacher,
            "data": self.data,
            "start": None if self.start is None else str(self.start),
            "reuse": vars(self.reuse),
        }
