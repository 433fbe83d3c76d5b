"""What became of the clips: numbers, reasons and pictures."""

from __future__ import annotations

import io
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fvgen.data.shards import PREVIEW, read_previews
from fvgen.io.contact_sheet import draw_contact_sheet
from fvgen.io.durable import write_durably, write_json_durably

if TYPE_CHECKING:
    from fvgen.data.prepare import Plan

SHEET_ROWS = 8
_FIGURES = (
    ("coverage", "share of covered pixels"),
    ("psnr_covered", "PSNR there, dB"),
    ("angle_deg", "angle of the ends, degrees"),
)


def write_report(output: Path, plan: Plan, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Writes ``report.json``, ``report.md`` and ``contact_sheet.png``; returns the report.

    Args:
        output: the directory of the set.
        plan: of the set.
        records: of all its shards, in order.
    """
    kept = [clip for record in records for clip in record["clips"]]
    rejected = [clip for record in records for clip in record["rejected"]]
    report = {
        "clips": {"planned": len(plan.clips), "written": len(kept), "rejected": len(rejected)},
        "scenes": {"read": len(plan.scenes), "rejected": len(plan.rejected)},
        "reasons": dict(sorted(Counter(clip["reason"] for clip in rejected).items())),
        "scene_reasons": dict(sorted(Counter(scene["reason"] for scene in plan.rejected).items())),
        "strides": {str(k): v for k, v in sorted(Counter(clip["stride"] for clip in kept).items())},
        "figures": {name: _spread([clip[name] for clip in kept]) for name, _ in _FIGURES} if kept else {},
        "settings": plan.settings,
        "versions": plan.versions,
        "rejected_scenes": list(plan.rejected),
        "rejected_clips": rejected,
        "written_clips": kept,
    }
    write_json_durably(output / "report.json", report)
    write_durably(output / "report.md", _markdown(report).encode())
    if kept:
        write_durably(output / "contact_sheet.png", _sheet(output, records))
    return report


def _spread(values: Sequence[float]) -> dict[str, float]:
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def _markdown(report: dict[str, Any]) -> str:
    counts, scenes = report["clips"], report["scenes"]
    lines = [
        "# Prepared clips",
        "",
        f"{counts['written']} of {counts['planned']} clips were written, {counts['rejected']} rejected."
        f" {scenes['read']} scenes were read, {scenes['rejected']} scenes gave no clip.",
        "",
    ]
    if report["figures"]:
        lines += ["| of the clips written | min | median | max |", "|---|---|---|---|"]
        for name, label in _FIGURES:
            lines.append(f"| {label} | " + " | ".join(f"{v:.4g}" for v in report["figures"][name].values()) + " |")
        lines += ["", "| stride | clips |", "|---|---|", *(f"| {k} | {v} |" for k, v in report["strides"].items()), ""]
    for title, reasons in (("clip", report["reasons"]), ("scene", report["scene_reasons"])):
        if reasons:
            lines += [f"| {title} rejected because | number |", "|---|---|", *(f"| {k} | {v} |" for k, v in reasons.items()), ""]
    lines += [f"- {s['scene']}: {s['reason']} ({s['detail']})" for s in report["rejected_scenes"]]
    for clip in report["rejected_clips"]:
        lines.append(f"- {clip['scene']}, frame {clip['first']} stride {clip['stride']}: {clip['reason']} ({clip['detail']})")
    return "\n".join(lines) + "\n"


def _sheet(output: Path, records: Sequence[dict[str, Any]]) -> bytes:
    """Some clips, spread over the set."""
    shown = [(record, i) for record in records for i in range(len(record[PREVIEW]))]
    count = min(SHEET_ROWS, len(shown))
    rows = []
    for record, i in (shown[n * (len(shown) - 1) // max(1, count - 1)] for n in range(count)):
        clip = record["clips"][record[PREVIEW][i]]
        label = (
            f"{clip['scene']}, frame {clip['first']} stride {clip['stride']}: first photo, then render and photo twice;"
            f" coverage {clip['coverage']:.0%}, {clip['psnr_covered']:.1f} dB"
        )
        rows.append((label, read_previews(output, record["number"])[i].float() / 255))
    picture = io.BytesIO()
    draw_contact_sheet(rows).save(picture, format="PNG")
    return picture.getvalue()
