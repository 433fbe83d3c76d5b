"""What a run leaves in its folder: ``losses.jsonl`` always, TensorBoard and Weights & Biases where installed, a progress line.

Statistics stay on the device until :meth:`History.collect` fetches all of them at once: reading one number per update would make
the host wait for the GPU each time.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.distill.calibration import calibration, calibration_table, weight_histogram
from fvgen.distill.guards import Record
from fvgen.distill.networks import derived_seed
from fvgen.distill.parallel import Parallel
from fvgen.io.durable import write_durably

LOSSES = "losses.jsonl"  # one line per update; depends on the seed alone, so that two runs can be compared bit for bit
PROGRESS = "progress.jsonl"  # what depends on the machine, and the histograms


class History:
    """Statistics of the updates since the last :meth:`collect`, still on the device."""

    def __init__(self) -> None:
        self._rows: list[tuple[Record, tuple[str, ...], Tensor]] = []
        self._samples: list[dict[str, Tensor]] = []

    def add(self, where: Record, statistics: dict[str, Tensor], samples: Sequence[dict[str, Tensor]]) -> None:
        """One update: what and when, its scalars, and the values of its samples."""
        values = torch.stack([v.detach().float().reshape(()) for v in statistics.values()])
        self._rows.append((where, tuple(statistics), values))
        self._samples.extend(samples)

    def collect(self, parallel: Parallel) -> tuple[list[Record], dict[str, Tensor]]:
        """Records in order, means over all ranks; and on the CPU the samples' values, those of this rank."""
        if not self._rows:
            return [], {}
        values = parallel.mean(torch.cat([v for _, _, v in self._rows])).tolist()
        records = []
        for where, names, _ in self._rows:
            records.append({**where, **dict(zip(names, values, strict=False))})
            values = values[len(names) :]
        names = {name for row in self._samples for name in row}
        samples = {name: torch.cat([row[name] for row in self._samples if name in row]).float().cpu() for name in sorted(names)}
        self._rows, self._samples = [], []
        return records, samples


def read_lines(path: Path) -> list[Record]:
    """The records of a log; lines that were cut short are left out."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [r for r in records if isinstance(r, dict)]


def keep_before(path: Path, stage: int, counter: str, now: int) -> None:
    """Drops the records from this moment of a stage on, ``counter`` being what they count it by, and lines cut short."""
    if path.is_file():
        kept = [r for r in read_lines(path) if (r["stage"], r[counter]) < (stage, now)]
        write_durably(path, "".join(f"{json.dumps(r)}\n" for r in kept).encode())


class RunLog:
    """The logs of one run.

    Args:
        folder: of the run.
        write: whether this process writes; others keep silent.
        wandb: also log to Weights & Biases.
        config: shown there.
    """

    def __init__(self, folder: Path, write: bool, wandb: bool = False, config: dict[str, Any] | None = None) -> None:
        self._folder, self._write = folder, write
        self._board: Any = None
        self._wandb: Any = None
        self._bar: Any = None
        if not write:
            return
        if importlib.util.find_spec("tensorboard") is None:
            print("fvgen: tensorboard is not installed (pip install tensorboard); the log is losses.jsonl alone", file=sys.stderr)
        else:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if wandb:
            import wandb as library  # its absence was told before the run began

            self._library = library
            name = folder.resolve().name
            # a continued run goes on there too; a name may have characters that no id may
            number = f"{derived_seed(str(folder.resolve())):016x}"
            self._wandb = library.init(project="fvgen", name=name, dir=str(folder), config=config, resume="allow", id=number)

    def begin(self, stage: int, update: int, iteration: int, iterations: int) -> None:
        """A stage begins or goes on at this update."""
        if not self._write:
            return
        keep_before(self._folder / LOSSES, stage, "step", update)
        keep_before(self._folder / PROGRESS, stage, "iteration", iteration)
        if self._bar is not None:
            self._bar.close()
        from tqdm import tqdm

        self._bar = tqdm(
            total=iterations, initial=iteration, desc=f"stage {stage}", unit="it", dynamic_ncols=True, mininterval=1.0
        )

    def tick(self) -> None:
        """An iteration is over."""
        if self._bar is not None:
            self._bar.update()

    def write(self, records: Sequence[Record], facts: dict[str, float]) -> None:
        """Appends the records; shows their means and ``facts`` of speed and memory."""
        if not self._write:
            return
        with (self._folder / LOSSES).open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)
        last = records[-1]
        step = last["iteration"]
        means = {f"stage{last['stage']}/{k}": v for k, v in _means(records).items()}
        means |= {f"stage{last['stage']}/{k}": v for k, v in facts.items()}
        self.scalars(means, step)
        if self._bar is not None:
            shown = {k.rpartition("/")[2]: f"{v:.3g}" for k, v in means.items() if k.endswith("_loss")}
            self._bar.set_postfix(shown, refresh=False)

    def histograms(self, last: Record, samples: dict[str, Tensor], facts: dict[str, float]) -> None:
        """Appends facts, calibration of the ratio and weights over time; the samples are finite numbers.

        Args:
            last: the record they lead up to.
            samples: values ``[N]`` by name.
            facts: of speed and memory.
        """
        if not self._write:
            return
        step, stage = last["iteration"], f"stage{last['stage']}"
        line: dict[str, Any] = {"stage": last["stage"], "iteration": step, **facts}
        if "logit_real" in samples:
            bins = calibration(samples["logit_real"], samples["logit_fake"])
            line["calibration"] = [asdict(b) for b in bins]
            if self._board is not None:
                self._board.add_text(f"{stage}/calibration", calibration_table(bins), step)
            if self._wandb is not None:
                rows = [[b.count, b.predicted, b.found] for b in bins]
                table = self._library.Table(columns=["clips", "predicted real", "found real"], data=rows)
                self._wandb.log({f"{stage}/calibration": table, "iteration": step})
            for name in ("logit_real", "logit_fake"):
                self._histogram(f"{stage}/{name}", samples[name], step)
        if "weight" in samples:
            parts = weight_histogram(samples["weight"], samples["time"])
            line["weights"] = [
                {"times": [low, high], "highest": float(w.max()), "counts": torch.histc(w, 10, 0, float(w.max())).int().tolist()}
                for low, high, w in parts
            ]
            for low, high, weights in parts:
                self._histogram(f"{stage}/weight/t{low}-{high}", weights, step)
        with (self._folder / PROGRESS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _histogram(self, name: str, values: Tensor, step: int) -> None:
        if self._board is not None:
            self._board.add_histogram(name, values, step)
        if self._wandb is not None:
            self._wandb.log({name: self._library.Histogram(values.numpy()), "iteration": step})

    def media(self, stage: str, folder: Path, step: int) -> None:
        """Contact sheet and videos of a validation, which are in ``folder``."""
        sheet, clips = folder / "contact_sheet.png", sorted(folder.glob("*.mp4"))
        if not self._write or not sheet.is_file():
            return
        if self._board is not None:  # its videos need moviepy; the files are there
            import numpy as np
            from PIL import Image

            with Image.open(sheet) as picture:
                self._board.add_image(f"{stage}/contact_sheet", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            media = {f"{stage}/contact_sheet": self._library.Image(str(sheet))}
            media |= {f"{stage}/{clip.stem}": self._library.Video(str(clip), format="mp4") for clip in clips}
            self._wandb.log({**media, "iteration": step})

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Curves for TensorBoard and Weights & Biases."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({**values, "iteration": step})

    def say(self, text: str) -> None:
        """A sentence that does not disturb the progress line."""
        if self._write:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends all logs."""
        for part in (self._bar, self._board):
            if part is not None:
                part.close()
        if self._wandb is not None:
            self._wandb.finish()


def _means(records: Sequence[Record]) -> dict[str, float]:
    """Means of every number, under the kind of update it belongs to."""
    sums: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if isinstance(value, float):
                sums.setdefault(f"{record['update']}/{name}", []).append(value)
    return {name: sum(v) / len(v) for name, v in sums.items()}
