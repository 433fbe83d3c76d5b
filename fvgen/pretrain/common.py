"""What both training loops share: learning-rate schedule, EMA, the log and its plot."""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Budget:
    """Progress through a run that ends after ``steps`` or ``minutes``, whichever comes first.

    A run that is bounded by steps alone repeats exactly; a time limit makes the number of steps depend on the machine.
    """

    def __init__(self, steps: int, minutes: float | None = None, seconds_before: float = 0.0) -> None:
        self.steps, self.seconds = steps, None if minutes is None else 60 * minutes
        self._start = time.monotonic() - seconds_before

    def elapsed(self) -> float:
        """Seconds spent, those before a resumption included."""
        return time.monotonic() - self._start

    def fraction(self, step: int) -> float:
        """Share of the run that is done before ``step``; 1 = stop."""
        done = step / self.steps
        if self.seconds is not None:
            done = max(done, self.elapsed() / self.seconds)
        return min(done, 1.0)


class Timer:
    """True once every ``minutes``; never for None."""

    def __init__(self, minutes: float | None) -> None:
        self._seconds = math.inf if minutes is None else 60 * minutes
        self._last = time.monotonic()

    def __call__(self) -> bool:
        if time.monotonic() - self._last < self._seconds:
            return False
        self._last = time.monotonic()
        return True


def learning_rate(fraction: float, peak: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then a cosine to zero."""
    if fraction < warmup:
        return peak * (fraction + 1e-3) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (fraction - warmup) / (1 - warmup)))


class Average:
    """Exponential moving average of a module's parameters, with a shorter memory at the start."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        targets, sources = list(self.module.parameters()), [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(targets, sources, 1 - decay)


class Log:
    """One JSON line per record in ``directory/name.jsonl``, echoed as text; records of steps before ``first_step`` are kept."""

    def __init__(self, directory: Path, name: str, first_step: int = 0, seconds_before: float = 0.0) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{name}.jsonl"
        before = path.read_text().splitlines() if first_step and path.is_file() else []
        kept = [line for line in before if json.loads(line)["step"] < first_step]
        self._file = path.open("w")
        self._file.writelines(f"{line}\n" for line in kept)
        self._start = time.monotonic() - seconds_before

    def write(self, **values: float) -> None:
        record = {"seconds": round(time.monotonic() - self._start, 1), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        print("  ".join(f"{k} {v:.4g}" for k, v in record.items()), flush=True)


def to_bytes(rgb: Tensor) -> Tensor:
    """[0, 1] to uint8, rounded."""
    return (rgb.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


def plot_curves(files: list[Path], output: Path) -> None:
    """One panel per log file with its loss and, where present, its PSNR."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(files), figsize=(6 * len(files), 3.6), squeeze=False)
    for axis, file in zip(axes[0], files, strict=True):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        train = [r for r in rows if "loss" in r]
        axis.semilogy([r["step"] for r in train], [r["loss"] for r in train], color="tab:blue", linewidth=1)
        axis.set(title=file.stem, xlabel="step", ylabel="training loss")
        scored = [r for r in rows if "psnr" in r]
        if scored:
            right = axis.twinx()
            right.plot([r["step"] for r in scored], [r["psnr"] for r in scored], color="tab:red", marker="o", markersize=3)
            right.set_ylabel("held-out PSNR (dB)", color="tab:red")
    figure.tight_layout()
    figure.savefig(output, dpi=120)
