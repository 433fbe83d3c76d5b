"""``fvgen bench``: measurements, comparisons with earlier ones, and reports."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fvgen.bench.compare import compare, different_machines, table
from fvgen.bench.record import Record, context, read_records, readable, value_of, write_records
from fvgen.cli import bench_train
from fvgen.utils.device import choose_device, take_gpu
from fvgen.utils.errors import UserError

if TYPE_CHECKING:
    from fvgen.bench.model import BenchModel

SUITES = ("kernels", "raster", "dust3r", "sampler", "train", "speedup")
REPORT_DIRECTORY = "docs/benchmarks"
# the suites that an option belongs to
BELONGS = {
    "ops": ("kernels",),
    "no_compile": ("kernels",),
    "first": ("kernels",),
    "model": ("sampler", "speedup", "train", "views"),
    "batch": ("sampler", "speedup"),
    "teacher_steps": ("sampler", "speedup"),
    "runner": ("sampler", "speedup"),
    "output": ("report",),
}
MEASURING = ("json", "rounds", "quick", "overwrite")


def run(arguments: argparse.Namespace) -> None:
    """Measures or reports; exits with status 1 where a figure fails."""
    _check_options(arguments)
    if bench_train.rank():  # takes part, and leaves files and words to the first process
        arguments.json = None
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            _measure(arguments)
        return
    old = read_records(arguments.compare) if arguments.compare else None
    if old == []:
        raise UserError(f"{arguments.compare} holds no records to compare with; give another --compare")
    if arguments.suite == "report":
        _report(arguments, old)
        return
    if arguments.json:
        _check_file(Path(arguments.json), arguments.overwrite)
    measured = _measure(arguments)
    failures = [] if arguments.quick else _too_slow(measured)
    if old is not None:
        failures += _compare(old, measured)
    if arguments.json:
        print(f"{len(measured)} records in {arguments.json}")
    if failures:
        _exit(failures)


def _check_options(arguments: argparse.Namespace) -> None:
    suite = arguments.suite
    for name, suites in BELONGS.items():
        if getattr(arguments, name) and suite not in suites and not (suite == "all" and suites != ("report",)):
            raise UserError(f"--{name.replace('_', '-')} belongs to {' and '.join(suites)}, not to {suite}; leave it out")
    if suite == "report":
        given = [name for name in MEASURING if getattr(arguments, name)]
        if given:
            raise UserError(f"--{given[0]} belongs to measurements, not to report; leave it out")
        if not arguments.results:
            raise UserError("report needs a result file, for example `fvgen bench report new.json`")
        return
    if arguments.results:
        raise UserError(f"{arguments.results[0]!r} is one word too many; only report takes result files")
    bench_train.check_options(arguments)


def _check_file(path: Path, overwrite: bool) -> None:
    """Refuses a result file that could not be written after minutes of measuring."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give --json a file")
    if path.exists() and not overwrite:
        raise UserError(f"the result file {path} exists; choose another --json or add --overwrite")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"cannot write into {parent}; choose another --json")


def _measure(arguments: argparse.Namespace) -> list[Record]:
    """Runs the suites one after the other; what is measured is in the result file at once."""
    from fvgen.bench.device import watched

    device = choose_device(arguments.device)
    suites = SUITES if arguments.suite == "all" else (arguments.suite,)
    model = None
    if {"sampler", "speedup", "views"} & set(suites):
        from fvgen.bench.model import find_bench_model

        model = find_bench_model(arguments.model or "tiny", device)
    if "kernels" in suites:
        from fvgen.bench.kernels import choose_specs

        choose_specs(arguments.ops, arguments.quick)
    if device.startswith("cuda"):
        take_gpu(bench_train.gpu(device))
    elif not arguments.quick:
        _say("there is no GPU: this takes long and says little; --quick shows that everything runs")
    shared = context(command_of(arguments))
    measured: list[Record] = []
    try:
        for suite in suites:
            print(f"\n{suite}" if len(suites) > 1 else suite)
            for record in watched(_suite(suite, arguments, device, model), device):
                measured.append({**record, **shared})
                print(_line(record), flush=True)
                if arguments.json:
                    write_records(arguments.json, measured)
    except KeyboardInterrupt:
        left = f"; {len(measured)} records are in {arguments.json}" if arguments.json and measured else ""
        print(f"\nfvgen: interrupted{left}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if type(error).__name__ not in ("OutOfMemoryError", "MemoryError"):
            raise
        step = suites == ("train",) and arguments.model
        what = "leave out --no-checkpointing, add --no-graphs or --shard" if step else "give a smaller --batch or --model"
        raise UserError(f"memory ran out; {what}, or measure on another --device") from error
    return measured


def _suite(suite: str, arguments: argparse.Namespace, device: str, model: BenchModel | None) -> Iterator[Record]:
    quick = arguments.quick

    def rounds(full: int, few: int) -> int:
        return arguments.rounds or (few if quick else full)

    if suite == "kernels":
        from fvgen.bench.bandwidth import copy_bandwidth, matmul_rate
        from fvgen.bench.kernels import measure_kernels

        _say("copy bandwidth and matrix product")
        ceilings: tuple[tuple[str, Callable[..., Any], float, str], ...] = (
            ("device_copy_bandwidth", copy_bandwidth, 1e9, "GB/s"),
            ("device_matmul_rate", matmul_rate, 1e12, "TFLOP/s"),
        )
        rates = {}
        for name, measure, scale, unit in ceilings:
            rates[name], timing = measure(device, rounds=rounds(20, 3))
            yield {"name": name, "suite": "device", "value": rates[name] / scale, "unit": unit, "timing": timing.fields()}
        copy, compiled = rates["device_copy_bandwidth"], not arguments.no_compile
        yield from measure_kernels(device, copy, arguments.ops, rounds(30, 3), compiled, quick, _say, arguments.first)
    elif suite == "raster":
        from fvgen.bench.raster import measure_raster

        yield from measure_raster(device, rounds(60, 3), quick, _say)
    elif suite == "train" and arguments.suite == "train" and arguments.model:
        yield from bench_train.measure(arguments, device, _say)
    elif suite == "dust3r":
        from fvgen.bench.dust3r import measure_dust3r

        yield from measure_dust3r(device, rounds(30, 2), quick, _say)
    elif suite == "train":
        from fvgen.bench.train import measure_train

        yield from measure_train(device, rounds(40, 3), quick, _say)
    elif suite == "views":
        from fvgen.bench.views import measure_views
        from fvgen.workers import workers

        assert model is not None
        with workers(device) as among:
            yield from measure_views(model, among, rounds(10, 1), quick, _say if among.main else lambda _: None)
    elif suite == "sampler":
        from fvgen.bench.first_call import measure_first_call
        from fvgen.bench.runner import find_runners
        from fvgen.bench.sampler import default_batches, measure_sampler

        assert model is not None
        kind = arguments.runner or "engine"
        yield measure_first_call(model, device, kind, quick, _say)
        batches = arguments.batch or default_batches(model.index, quick)
        steps, runners = arguments.teacher_steps or 50, find_runners(kind)
        offload = kind == "engine"
        yield from measure_sampler(model, device, batches, rounds(20, 2), steps, quick, runners, _say, offload)
    else:
        from fvgen.bench.runner import find_runners
        from fvgen.bench.speedup import measure_speedup

        assert model is not None
        runners = find_runners(arguments.runner or "engine")
        for batch in arguments.batch or [1]:
            steps = arguments.teacher_steps or 50
            yield from measure_speedup(model, device, batch, rounds(5, 1), steps, quick, runners, _say)


def command_of(arguments: argparse.Namespace) -> str:
    """The command to repeat a measurement, without places on this machine."""
    processes = bench_train.processes()
    launcher = ["torchrun", "--nproc-per-node", str(processes), "-m", "fvgen.cli"] if processes > 1 else ["fvgen"]
    words = [*launcher, "bench", arguments.suite]
    for name in ("quick", "no_compile", "first", "shard", "not_repeatable", "no_reference"):
        words += [f"--{name.replace('_', '-')}"] if getattr(arguments, name) else []
    for name in ("ops", "batch"):
        words += [f"--{name}", *map(str, getattr(arguments, name))] if getattr(arguments, name) else []
    for name in ("teacher_steps", "rounds"):
        words += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))] if getattr(arguments, name) else []
    for name in ("checkpointing", "graphs"):
        words += [] if getattr(arguments, name) is None else [f"--{name}" if getattr(arguments, name) else f"--no-{name}"]
    words += ["--stage", arguments.stage] if arguments.stage else []
    words += ["--single", Path(arguments.single).name] if arguments.single else []
    words += ["--profile", Path(arguments.profile).name] if arguments.profile else []
    words += ["--runner", arguments.runner] if arguments.runner else []
    words += ["--model", Path(arguments.model).name] if arguments.model else []
    words += ["--device", arguments.device] if arguments.device != "auto" else []
    return shlex.join([*words, "--json", "RESULT.json"])


def _line(record: Record) -> str:
    """One measurement as a line on the screen."""
    value, unit = value_of(record)
    if value is None:
        return f"{record['name']:<60} not measured: {record.get('failed', 'unknown')}"
    line = f"{record['name']:<60} {readable(value):>10} {unit}"
    if record.get("p10_ms") is not None:
        line += f"  [{readable(record['p10_ms'])}, {readable(record['p90_ms'])}]"
    if record.get("bandwidth_fraction") is not None:
        line += f"  {record['bandwidth_fraction']:.2g} of the copy bandwidth"
    if record.get("vs_compile") is not None:
        line += f"  torch.compile takes {record['vs_compile']:.2f} x"
    return line


def _too_slow(records: list[Record]) -> list[str]:
    """What fails beyond comparisons: too little time saved by the student."""
    from fvgen.bench.speedup import LEAST_PERCENT

    return [
        f"four steps save {r['value']:.1f} % of the teacher's time with {r['model']}, less than {LEAST_PERCENT:.0f} %"
        for r in records
        if r.get("suite") == "speedup" and r["unit"] == "%" and r["value"] < LEAST_PERCENT
    ]


def _compare(old: list[Record], new: list[Record]) -> list[str]:
    """Prints the comparison; what got worse as sentences."""
    changes = compare(old, new)
    print(f"\n{table(changes)}")
    warning = different_machines(old, new)
    if warning:
        _say(f"the comparison says little: {warning}")
    worse = [c.name for c in changes if c.regressed]
    if not worse:
        return []
    return [f"{len(worse)} of {len(changes)} figures got worse by more than 5 % or failed: {', '.join(worse)}"]


def _report(arguments: argparse.Namespace, old: list[Record] | None) -> None:
    from fvgen.bench.report import write_report

    records = [record for path in arguments.results for record in read_records(path)]
    print(write_report(records, arguments.output or REPORT_DIRECTORY))
    failures = [] if old is None else _compare(old, records)
    if failures:
        _exit(failures)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _exit(failures: list[str]) -> NoReturn:
    print(f"fvgen: {'; '.join(failures)}", file=sys.stderr)
    raise SystemExit(1)
