"""Result files: a list of records that say what was measured, how and on what; and the summary that README and docs quote.

``python -m benchmarks.record RESULT.json [--summary benchmarks/results/h200/summary.json]`` copies figures into the summary.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from fvgen.io.durable import write_json_durably
from fvgen.utils.errors import UserError

Record = dict[str, Any]

# key of a record -> unit; the first one present is the figure
VALUES = {"median_ms": "ms", "median_s": "s", "seconds": "s", "psnr_db": "dB", "bytes": "bytes", "value": ""}


def context(command: str) -> Record:
    """Machine, versions, commit, command and date of a run; see :func:`fvgen.evaluation.provenance.provenance`."""
    from fvgen.evaluation.provenance import provenance

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "none"
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {**provenance(command), "triton": triton, "date": date}


def write_records(path: str | os.PathLike[str], records: list[Record]) -> None:
    """Writes a result file, which is there as a whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_durably(path, records)


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a result file: a list, a single record, or a summary.

    Raises:
        UserError: there is no such file, or it is something else.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"the result file {path} cannot be read ({error.strerror}); give a file written by fvgen bench") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); give a file written by fvgen bench") from None
    if isinstance(found, dict):
        found = [found] if "name" in found else [{"name": n, **e} if isinstance(e, dict) else e for n, e in found.items()]
    if not isinstance(found, list) or not all(isinstance(r, dict) and isinstance(r.get("name"), str) for r in found):
        raise UserError(f"{path} is no list of records with names; give a file written by fvgen bench")
    return found


def value_of(record: Record) -> tuple[float | None, str]:
    """Figure and unit of a record; the figure is None for a measurement that failed."""
    key = None if record.get("failed") else next((k for k in VALUES if record.get(k) is not None), None)
    return (None, str(record.get("unit", ""))) if key is None else (record[key], record.get("unit") or VALUES[key])


def readable(value: float | None, digits: int = 4) -> str:
    """A figure with so many significant digits and without powers of ten, "–" for None."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def is_quick(record: Record) -> bool:
    """Whether a record only shows that a measurement runs: its sizes are small, its name may be that of a real one."""
    return "--quick" in str(record.get("command", "")).split()


def figure(record: Record, date: str) -> Record:
    """The summary's entry for one record.

    Raises:
        ValueError: the record lacks its value, unit, commit or command, or is of a quick run.
    """
    if is_quick(record):
        raise ValueError(f"record {record.get('name')!r} is of a quick run, which measures nothing")
    value, unit = value_of(record)
    if value is None:
        raise ValueError(f"record {record.get('name')!r} has none of {', '.join(VALUES)}")
    missing = [k for k in ("name", "commit", "command") if not record.get(k)] + ([] if unit else ["unit"])
    if missing:
        raise ValueError(f"record {record.get('name')!r} lacks {', '.join(missing)}")
    entry = {"value": value, "unit": unit, "commit": record["commit"], "command": record["command"]}
    return {**entry, "date": record.get("date", date)}


def update(summary: Record, records: list[Record], date: str) -> Record:
    """A new summary, sorted by name, in which the records replace what has their names."""
    return dict(sorted({**summary, **{r["name"]: figure(r, date) for r in records}}.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Copies the figures of a result file into the summary that is quoted")
    parser.add_argument("result", type=Path, help="file written by a benchmark: a record or a list of records")
    parser.add_argument("--summary", type=Path, help="default: summary.json beside the result")
    options = parser.parse_args(argv)
    path = options.summary or options.result.with_name("summary.json")
    try:
        records = read_records(options.result)
        date = datetime.date.fromtimestamp(options.result.stat().st_mtime).isoformat()
        old = json.loads(path.read_text()) if path.is_file() else {}
        new = update(old, [r for r in records if not r.get("failed")], date)
    except ValueError as error:
        print(f"{options.result}: {error}", file=sys.stderr)
        return 2
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_durably(path, new)
    for record in records:
        if record.get("failed"):
            print(f"{record['name']}: not measured ({record['failed']})")
    for name in sorted({r["name"] for r in records if not r.get("failed")}):
        before = f" (was {old[name]['value']:.6g})" if name in old else ""
        print(f"{name}: {new[name]['value']:.6g} {new[name]['unit']}{before}")
    return 0
