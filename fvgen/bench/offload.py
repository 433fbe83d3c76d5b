"""Clips on a GPU with little memory: the model stays in the processor's memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fvgen.bench.device import GpuWatch
from fvgen.bench.model import BenchModel, render_call
from fvgen.bench.timing import inference, time_calls
from fvgen.models.bundle import ModelBundle
from fvgen.sampling import ModelSampler

STEPS = 4


def measure_offload(
    model: BenchModel, bundle: ModelBundle, device: str, rounds: int, quick: bool, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Records of one clip's time and, on a GPU, of its peak memory, with :attr:`ModelSampler.offload`.

    Args:
        model: what is measured.
        bundle: the model, loaded; it is moved to the CPU.
        device: where clips are made.
        rounds: readings.
        quick: a clip of 4 frames and 64 x 96 pixels.
        facts: for the records.
    """
    sampler = ModelSampler(bundle.to("cpu"), offload=device)
    render = render_call(model.index, device, 1, quick)

    def call() -> Any:
        return sampler.decode(sampler.few_step(sampler.condition(render()), STEPS))

    with inference(), GpuWatch(device) as watch:
        timing = time_calls(call, device, rounds)
    shared = {**facts, "runner": "engine, offloaded", "batch": 1, "steps": STEPS, "stage": "clip, offloaded"}
    yield {"name": f"clip_{model.tag}_offload_ms", **shared, "unit": "ms", **timing.fields()}
    yield from peak(f"clip_{model.tag}_offload_peak_gb", shared, watch.facts["peak_memory_bytes"])


def peak(name: str, facts: dict[str, Any], allocated: int | None) -> Iterator[dict[str, Any]]:
    """The record of a peak in units of 10^9 bytes, none where it is not known."""
    if allocated is not None:
        yield {"name": name, **facts, "value": allocated / 1e9, "unit": "GB"}
