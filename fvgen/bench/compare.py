"""Old and new figures side by side, and which of them got worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fvgen.bench.record import Record, readable, value_of
from fvgen.utils.errors import UserError

LIMIT = 0.05
HIGHER_IS_BETTER = {"dB", "%", "x", "clips/s", "GB/s", "TFLOP/s", "of the copy bandwidth"}


@dataclass(frozen=True)
class Change:
    """One figure in two runs.

    Attributes:
        name, unit: of the record.
        old, new: None where the run lacks it or its measurement failed.
        worse_by: relative change for the worse (negative: better), None where one of them is missing.
        regressed: worse by more than the limit, or measured before and failed now. A time of a single reading ("count": 1),
            such as that of loading a model, is shown but never called a regression.
    """

    name: str
    unit: str
    old: float | None
    new: float | None
    worse_by: float | None
    regressed: bool


def compare(old: Sequence[Record], new: Sequence[Record], limit: float = LIMIT) -> list[Change]:
    """Every figure that is in both runs, in the order of the new one; of records with one name the last counts.

    Raises:
        UserError: they have no figure in common.
    """
    before = {r["name"]: value_of(r)[0] for r in old}
    rows = [_change(name, record, before[name], limit) for name, record in {r["name"]: r for r in new}.items() if name in before]
    if not rows:
        raise UserError("the two results have no record name in common; compare runs of the same benchmark")
    return rows


def _change(name: str, record: Record, old: float | None, limit: float) -> Change:
    new, unit = value_of(record)
    if old is None or new is None:
        return Change(name, unit, old, new, None, regressed=old is not None)
    higher = unit in HIGHER_IS_BETTER
    worse_by = (old - new if higher else new - old) / (abs(old) or 1e-30)
    return Change(name, unit, old, new, worse_by, regressed=worse_by > limit and record.get("count") != 1)


def table(changes: Sequence[Change]) -> str:
    """The comparison as text, one line per figure."""
    wide = max(len(c.name) for c in changes)
    lines = [f"{'name':<{wide}} {'old':>12} {'new':>12} {'':<8} change"]
    for c in changes:
        old, new = ("failed" if v is None else readable(v, 5) for v in (c.old, c.new))
        if c.worse_by is None:
            verdict = "FAILED NOW" if c.regressed else "no old figure"
        elif abs(c.worse_by) < 5e-4:
            verdict = "same"
        else:
            verdict = f"{100 * abs(c.worse_by):.1f} % {'worse' if c.worse_by > 0 else 'better'}"
            verdict += "  REGRESSION" if c.regressed else ""
        lines.append(f"{c.name:<{wide}} {old:>12} {new:>12} {c.unit:<8} {verdict}")
    return "\n".join(lines)


def different_machines(old: Sequence[Record], new: Sequence[Record]) -> str | None:
    """A warning where the two runs are not of one GPU type, None otherwise."""
    a, b = ({str(r["gpu"]) for r in records if r.get("gpu")} for records in (old, new))
    return f"different GPUs: {', '.join(sorted(a))} before, {', '.join(sorted(b))} now" if a and b and a != b else None
