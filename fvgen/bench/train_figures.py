"""Records of a measured training step: times, clips per second, memory, scaling, and what a whole run is estimated to take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fvgen.bench.record import Record, value_of
from fvgen.bench.timing import Timing
from fvgen.bench.train_step import Measured, StepOptions, make_parts
from fvgen.distill.parallel import Parallel
from fvgen.utils.errors import UserError

PAPER_GPUS = 8
SAME = ("model", "checkpointing", "graphs", "repeatable", "clips_per_gpu", "frames", "image_size")


def step_records(
    options: StepOptions,
    parallel: Parallel,
    stages: dict[int, Measured],
    plain: Measured | None,
    single: Sequence[Record] | None = None,
) -> list[Record]:
    """All records of a run; docs/training.md lists their names.

    Args:
        options: what was measured.
        parallel: on how many GPUs.
        stages: stage -> readings.
        plain: of stage 2 in plain PyTorch.
        single: records of the same measurement on one GPU, for the scaling.

    Raises:
        UserError: ``single`` is of something else.
    """
    spec, settings = make_parts(options, parallel.world)
    index, world = spec.index, parallel.world
    shared = {
        "suite": "train",
        "model": options.model,
        "weights": "random weights",
        "quick": options.quick,
        "gpus": world,
        "layout": "replicate" if parallel.mesh is None else "shard",
        "batch": settings.batch,
        "clips_per_gpu": settings.batch // world,
        "frames": index.frames,
        "image_size": [index.height, index.width],
        "guidance_scale": settings.guidance,
        "checkpointing": settings.checkpointing,
        "graphs": settings.graphs,
        "repeatable": settings.repeatable,
    }
    tag, suffix = tag_of(options.model), suffix_of(parallel)
    records: list[Record] = []
    for stage, found in stages.items():
        facts = {**shared, "stage": stage, "kernels": "strict", **_state(found)}
        updates = 1 + len(found.critic) // len(found.iteration)
        step = Timing.of(found.iteration, found.method)
        counted = {"updates": updates, "clips_per_step": updates * settings.batch}
        rate = 1e3 * updates * settings.batch / step.median_ms
        records += [
            {"name": f"train_stage{stage}_step_{tag}{suffix}_ms", **facts, **counted, "unit": "ms", **step.fields()},
            _timed(f"train_stage{stage}_critic_update_{tag}{suffix}_ms", facts, found.critic, found.method),
            _timed(f"train_stage{stage}_student_update_{tag}{suffix}_ms", facts, found.student, found.method),
            {"name": f"train_stage{stage}_samples_per_s_{tag}{suffix}", **facts, **counted, "value": rate, "unit": "clips/s"},
        ]
        if found.profile is not None and found.profile.busy_percent is not None:
            busy = {"value": found.profile.busy_percent, "unit": "%", "groups_percent": found.profile.groups()}
            records.append({"name": f"train_stage{stage}_gpu_busy_{tag}{suffix}", **facts, **busy})
    if plain is not None:
        slow = _timed(f"train_stage2_step_reference_{tag}_ms", {**shared, "stage": 2}, plain.iteration, plain.method)
        records.append({**slow, "kernels": "reference", **_state(plain)})
        ratio = slow["median_ms"] / Timing.of(stages[2].iteration, "").median_ms
        records.append({"name": _named("train_stage2_speedup_vs_reference", tag), **shared, "value": ratio, "unit": "x"})
    return [*records, *_totals(shared, tag, suffix, stages, settings.iterations, single)]


def _totals(
    shared: Record,
    tag: str,
    suffix: str,
    stages: dict[int, Measured],
    iterations: Sequence[int],
    single: Sequence[Record] | None,
) -> list[Record]:
    """What is said of both stages together."""
    world, records = shared["gpus"], []
    layout = suffix.removeprefix(f"_x{world}")
    peaks = {s: m.peak for s, m in stages.items() if m.peak is not None}
    if peaks:
        each = {f"stage{s}_gb": peak / 1e9 for s, peak in peaks.items()}
        reserved = max(m.reserved or 0 for m in stages.values()) / 1e9
        value = {"value": max(peaks.values()) / 1e9, "unit": "GB", "reserved_gb": reserved, **each}
        records.append({"name": f"{_named('train_peak_gb', tag)}_x{world}{layout}", **shared, **value})
    medians = {s: Timing.of(m.iteration, m.method).median_ms for s, m in stages.items()}
    if single is not None:
        each = {f"stage{s}_percent": 100 * alone(single, s, shared, tag) / ms for s, ms in medians.items()}
        value = {"value": min(each.values()), "unit": "%", **each}
        records.append({"name": f"{_named('train_scaling', tag)}_x{world}{layout}", **shared, **value})
    if set(stages) >= {1, 2}:
        hours = sum(n * medians[s + 1] for s, n in enumerate(iterations)) / 3.6e6
        assumed = f"an estimate: {' + '.join(map(str, iterations))} steps that take on {PAPER_GPUS} GPUs as long as on {world}"
        value = {"value": hours, "unit": "h", "assumes": f"{assumed}; one clip per GPU; no data, checkpoints or validation"}
        records.append({"name": f"train_estimate_{PAPER_GPUS}gpu_hours_{tag}_from_x{world}{layout}", **shared, **value})
    return records


def check_single(records: Sequence[Record], options: StepOptions) -> None:
    """Raises UserError unless the scaling can be computed from these records, before minutes are spent."""
    spec, settings = make_parts(options, 1)
    shared = {
        "model": options.model,
        "checkpointing": settings.checkpointing,
        "graphs": settings.graphs,
        "repeatable": settings.repeatable,
        "clips_per_gpu": settings.batch,
        "frames": spec.index.frames,
        "image_size": [spec.index.height, spec.index.width],
    }
    for stage in options.stages:
        alone(records, stage, shared, tag_of(options.model))


def alone(records: Sequence[Record], stage: int, shared: Record, tag: str) -> float:
    """Milliseconds of the stage's step on one GPU, for weak scaling: as many clips per GPU, and the same settings.

    Raises:
        UserError: they are not there, or differ.
    """
    name = f"train_stage{stage}_step_{tag}_ms"
    found = next((r for r in records if r["name"] == name and r.get("gpus") == 1), None)
    value = None if found is None else value_of(found)[0]
    if found is None or value is None:
        raise UserError(f"the --single result holds no {name}; give the file of the same command on one GPU")
    other = [key for key in SAME if found.get(key) != shared[key]]
    if other:
        raise UserError(f"the --single result is of another {', '.join(other)}; measure one GPU with the same options")
    return value


def tag_of(model: str) -> str:
    """Stands for the model in names: "512" for viewcrafter_512."""
    return model.removeprefix("viewcrafter_")


def suffix_of(parallel: Parallel) -> str:
    """Stands for the GPUs in names: nothing for one, ``_xN`` for N that share the networks."""
    if parallel.world == 1:
        return "" if parallel.mesh is None else "_x1_sharded"
    return f"_x{parallel.world}" + ("_replicated" if parallel.mesh is None else "")


def _named(name: str, tag: str) -> str:
    return name if tag == "512" else f"{name}_{tag}"


def _timed(name: str, facts: Record, readings: Sequence[float], method: str) -> Record:
    return {"name": name, **facts, "unit": "ms", **Timing.of(readings, method).fields()}


def _state(found: Measured) -> dict[str, Any]:
    return {"peak_memory_bytes": found.peak, "reserved_memory_bytes": found.reserved, "gpu_state": found.gpu_state}
