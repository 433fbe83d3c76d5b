"""A result file as Markdown tables with pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fvgen.bench.plots import draw, stage_label
from fvgen.bench.record import Record, is_quick, readable, value_of
from fvgen.utils.errors import UserError

REPORT_FILE = "report.md"
UNKNOWN = "not available"
ORIGIN = ("gpu", "driver", "torch", "triton", "cuda", "commit", "command")
TITLES = {
    "device": "Ceilings of the GPU",
    "sampler": "Clips",
    "speedup": "Teacher and student",
    "views": "New views by several processes",
    "kernels": "Operators",
    "raster": "Point rasterizer",
    "dust3r": "DUSt3R",
    "train": "Training step",
    "other": "Other figures",
}
PICTURES = {
    "waterfall.png": "sampler",
    "batch_scaling.png": "sampler",
    "bandwidth.png": "kernels",
    "roofline.png": "kernels",
    "raster_scaling.png": "raster",
}


def write_report(records: Sequence[Record], folder: str | os.PathLike[str]) -> Path:
    """Writes ``report.md`` and its pictures into ``folder`` and returns the former's path.

    Args:
        records: of one or more result files.
        folder: is made; an earlier report in it is replaced.

    Raises:
        UserError: no records, a folder that cannot be written, matplotlib missing.
    """
    if not records:
        raise UserError("the result holds no records; measure something first, for example with `fvgen bench kernels`")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = draw(records, folder)
        text = report_text(records, pictures)
        (folder / REPORT_FILE).write_text(text)
    except ImportError as error:
        raise UserError(f"the pictures need matplotlib ({error}); install it with pip install matplotlib") from None
    except OSError as error:
        raise UserError(f"cannot write the report into {folder} ({error.strerror}); choose another --output") from None
    return folder / REPORT_FILE


def report_text(records: Sequence[Record], pictures: dict[str, str]) -> str:
    """The report as Markdown.

    Args:
        records: as they were written.
        pictures: file name -> caption.
    """
    lines = ["# Measured", "", "Written by `fvgen bench report` from the result files; times are medians.", "", *_origin(records)]
    if any(map(is_quick, records)):
        lines += ["", "Measured with `--quick`, at small shapes in few rounds: this shows that it runs, and measures nothing."]
    suites: dict[str, list[Record]] = {}
    for record in records:
        suites.setdefault(_suite(record), []).append(record)
    for suite, title in TITLES.items():
        if suite in suites:
            rows, failed = [r for r in suites[suite] if not r.get("failed")], [r for r in suites[suite] if r.get("failed")]
            lines += ["", f"## {title}", "", *(TABLES.get(suite, _plain)(rows) if rows else ["Nothing could be measured."])]
            lines += ["", "Not measured:", "", *(f"- `{r['name']}`: {r['failed']}" for r in failed)] if failed else []
            for name, caption in pictures.items():
                if PICTURES[name] == suite:
                    lines += ["", caption, "", f"![{caption}]({name})"]
    return "\n".join(lines) + "\n"


def _suite(record: Record) -> str:
    suite = record.get("suite") or ("raster" if record["name"].startswith("raster_") else "other")
    return suite if suite in TITLES else "other"


def _origin(records: Sequence[Record]) -> list[str]:
    """Where the records come from; several values where runs differ."""
    rows = []
    for key in ORIGIN:
        found = list(dict.fromkeys(str(r[key]) for r in records if r.get(key)))
        rows.append([key, "; ".join(f"`{v}`" if key == "command" else v for v in found) or UNKNOWN])
    dates = sorted(str(r["date"]) for r in records if r.get("date"))
    rows.append(["date", UNKNOWN if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"])
    states = [r["gpu_state"] for r in records if r.get("gpu_state")]
    clocks = [mhz for s in states for mhz in s.get("sm_mhz") or () if mhz is not None]
    rows.append(["SM clock around the measurements", f"{min(clocks)} to {max(clocks)} MHz" if clocks else UNKNOWN])
    known = [s["throttled"] for s in states if s.get("throttled") is not None]
    reasons = sorted({reason for s in known for reason in s})
    rows.append(["clocks held down by", (", ".join(reasons) or "nothing") if known else UNKNOWN])
    return _table(["what", "value"], rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(r) for r in rows)]


def _number(value: float | None) -> str:
    return readable(value, 3)


def _ms(record: Record) -> list[str]:
    def ms(key: str) -> float | None:
        return 1e3 * record[f"{key}_s"] if record.get(f"{key}_s") is not None else record.get(f"{key}_ms")

    spread = "–" if ms("p10") is None else f"{_number(ms('p10'))} to {_number(ms('p90'))}"
    return [_number(ms("median")), spread]


def _plain(rows: Sequence[Record]) -> list[str]:
    values = ((r["name"], *value_of(r)) for r in rows)
    return _table(["name", "value", "unit"], [[f"`{n}`", _number(v), unit] for n, v, unit in values])


def _kernels(rows: Sequence[Record]) -> list[str]:
    names = list(dict.fromkeys(name for r in rows for name in r.get("others", {}) if name not in ("reference", "torch.compile")))
    head = ["operator", "shape", "dtype", "ms", "10 to 90 %", "share of copy bandwidth", "reference", "torch.compile", *names]

    def other(record: Record, name: str) -> str:
        found = record.get("others", {}).get(name)
        if found is None:
            return "–"
        if found.get("median_ms") is None:
            return f"failed ({found.get('failed', 'unknown').partition(':')[0]})"
        return f"{_number(found['median_ms'])} ({found['median_ms'] / record['median_ms']:.2f} x)"

    cells = []
    for r in rows:
        fraction = r.get("bandwidth_fraction")
        own = [f"`{r['op']}`", r["case"], r["dtype"], *_ms(r), "–" if fraction is None else f"{fraction:.2f}"]
        cells.append([*own, *(other(r, name) for name in ("reference", "torch.compile", *names))])
    note = "In brackets: how many times as long as the operator; below 1 the operator is the slower one."
    where = sorted({r.get("path", "") for r in rows})
    return [*_table(head, cells), "", note, *(["", f"Path of the operators: {', '.join(where)}."] if any(where) else [])]


def _raster(rows: Sequence[Record]) -> list[str]:
    head = ["name", "views", "points", "image", "K", "ms", "10 to 90 %", "extra memory, MB", "PyTorch3D, ms"]

    def cells(r: Record) -> list[str]:
        extra, theirs = r.get("extra_memory_bytes"), r.get("others", {}).get("pytorch3d", {}).get("median_ms")
        size = "–" if "image_size" not in r else "{} x {}".format(*r["image_size"])
        counts = [str(r.get("views", "–")), str(r.get("points", "–")), size, str(r.get("points_per_pixel", "–"))]
        return [f"`{r['name']}`", *counts, *_ms(r), "–" if extra is None else f"{extra / 1e6:.0f}", _number(theirs)]

    return _table(head, [cells(r) for r in rows])


def _sampler(rows: Sequence[Record]) -> list[str]:
    """Stages and whole clips; throughput and other figures of whole clips below."""
    head = ["model", "weights", "sampler", "batch", "stage", "ms", "10 to 90 %"]
    head += ["peak memory, GB", "graph, GB", "clips/s", "J per clip"]
    timed = [r for r in rows if r.get("stage") and ("median_ms" in r or "median_s" in r)]
    others = [r for r in rows if r not in timed]

    def gigabytes(size: int | None) -> str:
        return "–" if size is None else f"{size / 1e9:.2f}"

    def cells(r: Record) -> list[str]:
        memory = [gigabytes(r.get("peak_memory_bytes")), gigabytes(r.get("graph_memory_bytes"))]
        stage = stage_label(r["stage"]) + (f", {r['steps']} steps" if r["stage"] in ("clip", "teacher clip") else "")
        what = [r["model"], r["weights"], r["runner"], str(r["batch"]), stage]
        return [*what, *_ms(r), *memory, _number(r.get("clips_per_second")), _number(r.get("energy_per_clip_j"))]

    return [*_table(head, [cells(r) for r in timed]), *(["", *_plain(others)] if others else [])]


def _speedup(rows: Sequence[Record]) -> list[str]:
    head = ["name", "steps", "guidance", "value", "unit", "10 to 90 %, ms"]

    def cells(r: Record) -> list[str]:
        value, unit = value_of(r)
        return [f"`{r['name']}`", str(r.get("steps", "–")), str(r.get("guidance_scale", "–")), _number(value), unit, _ms(r)[1]]

    kinds = sorted({f"{r.get('model')}: {r.get('weights')}" for r in rows})
    return [*_table(head, [cells(r) for r in rows]), "", f"Render, encode, sample and decode of one clip; {', '.join(kinds)}."]


def _views(rows: Sequence[Record]) -> list[str]:
    head = ["name", "model", "weights", "new views", "processes", "clips at once", "ms", "10 to 90 %", "times as fast as one"]

    def cells(r: Record) -> list[str]:
        counts = [str(r[key]) for key in ("model", "weights", "new_views", "processes", "clips_at_once")]
        return [f"`{r['name']}`", *counts, *_ms(r), _number(r.get("times_as_fast"))]

    counted = sorted({r["counted"] for r in rows})
    return [*_table(head, [cells(r) for r in rows]), "", f"Counted {'; '.join(counted)}."]


TABLES: dict[str, Callable[[Sequence[Record]], list[str]]] = {
    "kernels": _kernels,
    "raster": _raster,
    "sampler": _sampler,
    "speedup": _speedup,
    "views": _views,
}
