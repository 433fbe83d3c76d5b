"""Copies the figures of a result file into the summary that README and docs quote.

python -m benchmarks.record RESULT.json [--summary benchmarks/results/h200/summary.json]
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

# key of a record -> unit; the first one present is the figure
VALUES = {"median_ms": "ms", "seconds": "s", "psnr_db": "dB", "bytes": "bytes", "value": ""}


def figure(record: dict[str, Any], date: str) -> dict[str, Any]:
    """The summary's entry for one record.

    Raises:
        ValueError: the record lacks its value, unit, commit or command.
    """
    key = next((k for k in VALUES if k in record), None)
    if key is None:
        raise ValueError(f"record {record.get('name')!r} has none of {', '.join(VALUES)}")
    unit = record.get("unit", VALUES[key])
    missing = [k for k in ("name", "commit", "command") if not record.get(k)] + ([] if unit else ["unit"])
    if missing:
        raise ValueError(f"record {record.get('name')!r} lacks {', '.join(missing)}")
    entry = {"value": record[key], "unit": unit, "commit": record["commit"], "command": record["command"]}
    return {**entry, "date": record.get("date", date)}


def update(summary: dict[str, Any], records: list[dict[str, Any]], date: str) -> dict[str, Any]:
    """A new summary, sorted by name, in which the records replace what has their names."""
    return dict(sorted({**summary, **{r["name"]: figure(r, date) for r in records}}.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="file written by a benchmark: a record or a list of records")
    parser.add_argument("--summary", type=Path, help="default: summary.json beside the result")
    options = parser.parse_args(argv)
    path = options.summary or options.result.with_name("summary.json")
    records = json.loads(options.result.read_text())
    records = records if isinstance(records, list) else [records]
    date = datetime.date.fromtimestamp(options.result.stat().st_mtime).isoformat()
    old = json.loads(path.read_text()) if path.is_file() else {}
    try:
        new = update(old, records, date)
    except ValueError as error:
        print(f"{options.result}: {error}", file=sys.stderr)
        return 2
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(new, indent=1) + "\n")
    for name in sorted({r["name"] for r in records}):
        before = f" (was {old[name]['value']:.6g})" if name in old else ""
        print(f"{name}: {new[name]['value']:.6g} {new[name]['unit']}{before}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
