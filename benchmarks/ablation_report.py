"""The table, the records and the plots of what ``python -m benchmarks.ablation`` found in one or several folders.

``python -m benchmarks.ablation_report FOLDER... --json RESULT.json --plot CURVES.png``
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.ablation import CURVE, GUIDED, ROWS, SCORES
from fvgen.bench.record import read_records, write_records
from fvgen.utils.errors import UserError

LABELS = {
    "vae": "truth through the VAE",
    "teacher50": "teacher, DDIM, 50 steps",
    "teacher4": "teacher, DDIM, 4 steps",
    "untrained": "teacher's weights under the student's sampler",
    "student": "bundled student",
    "fast": "bundled student in fast mode",
    "fvgen": "full method",
    "stage_one_only": "stage 1 only",
    "reverse_kl": "stage 2 with plain reverse KL",
    "no_stage_one": "stage 2 without stage 1",
    "dmd2": "DMD2",
    "causvid": "CausVid-type",
}
NAMES = {"student": "student4"}  # of records, where a row has another
FIGURES = ("psnr", "psnr_covered", "psnr_uncovered", "ssim", "frechet")

Row = dict[str, Any]


def read_scores(folders: Sequence[Path]) -> dict[str, list[Row]]:
    """Scores by row, one per seed, in the order of the table; what several folders hold counts once.

    Raises:
        UserError: a folder holds none.
    """
    found: dict[tuple[str, int], Row] = {}
    for folder in folders:
        for score in read_scores_of(folder):
            found.setdefault((score["row"], score["seed"]), score)
    order, rows = list(LABELS), {row for row, _ in found}
    guided = sorted((row for row in rows if row.startswith(GUIDED)), key=lambda row: float(row.removeprefix(GUIDED)))
    at = order.index("teacher50") + 1
    order[at:at] = guided
    return {row: [s for (name, _), s in sorted(found.items()) if name == row] for row in order if row in rows}


def label(row: str) -> str:
    """Of a row of the table."""
    return f"{LABELS['teacher50']}, guidance {row.removeprefix(GUIDED)}" if row.startswith(GUIDED) else LABELS[row]


def read_scores_of(folder: Path) -> list[Row]:
    """The scores of one folder."""
    path = folder / SCORES
    if not path.is_file():
        raise UserError(f"{folder} has no {SCORES}; give folders written by python -m benchmarks.ablation")
    return json.loads(path.read_text())


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and standard deviation over the seeds where there are at least two."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def records(scores: dict[str, list[Row]], context: Row) -> list[Row]:
    """One record per row."""
    made = []
    for name, row, seeds in _named(scores):
        facts: Row = {"row": row, "clips": seeds[0]["clips"], "seeds": [s["seed"] for s in seeds], "unit": "dB"}
        for figure in FIGURES:
            mean, deviation = spread([s[figure] for s in seeds])
            facts |= {figure: mean} | ({f"{figure}_deviation": deviation} if deviation is not None else {})
        facts["real_psnr"] = {name: fmean(s["real_psnr"][name] for s in seeds) for name in seeds[0]["real_psnr"]}
        facts |= {k: seeds[0][k] for k in ("iterations", "lr", "batch") if k in seeds[0]}
        facts |= {"stopped": [s["stopped"] for s in seeds if s.get("stopped")]} if any(s.get("stopped") for s in seeds) else {}
        made.append({"name": name, "value": facts["psnr"], **facts, **context})
    return made


def _named(scores: dict[str, list[Row]]) -> Iterator[tuple[str, str, list[Row]]]:
    """Name of the record, row and its seeds."""
    for row, seeds in scores.items():
        yield f"ablation_{row}_psnr" if row in ROWS else f"tiny_psnr_{NAMES.get(row, row)}", row, seeds


def table(scores: dict[str, list[Row]]) -> str:
    """Markdown: every row with mean and, over several seeds, standard deviation."""
    real = sorted({name for seeds in scores.values() for s in seeds for name in s["real_psnr"]})
    heads = ["", "seeds", "PSNR, dB", "covered", "uncovered", "SSIM", "Fréchet", *real]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row, seeds in scores.items():
        cells = [label(row), str(len(seeds))]
        for figure, digits in zip(FIGURES, (2, 2, 2, 4, 4), strict=True):
            mean, deviation = spread([s[figure] for s in seeds])
            cells.append(f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else ""))
        for name in real:
            values = [s["real_psnr"][name] for s in seeds if name in s["real_psnr"]]
            cells.append(f"{fmean(values):.2f}" if values else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(folders: Sequence[Path], scores: dict[str, list[Row]], path: Path) -> None:
    """Held-out PSNR and Fréchet distance during training; a second stage begins where the first ended."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="tight")
    colours = {row: f"C{i}" for i, row in enumerate(ROWS)}
    named = set()
    for folder in folders:
        for run in sorted(folder.glob(f"*/{CURVE}")):
            row = run.parent.name.rpartition("-")[0]
            seed = run.parent.name.rpartition("-")[2]
            lines = [json.loads(line) for line in run.read_text().splitlines()]
            first = {1: 0, 2: max((x["iteration"] for x in lines if x["stage"] == 1), default=0)}
            before = folder / f"{ROWS[row][2]}-{seed}" / CURVE
            if ROWS[row][2] is not None and before.is_file():
                earlier = [json.loads(line) for line in before.read_text().splitlines()]
                first[2] = earlier[-1]["iteration"]
                lines = earlier[-1:] + lines  # joined to where it began
            at = [x["iteration"] + first[x["stage"]] for x in lines]
            for axis, figure_name in zip(axes, ("psnr", "frechet"), strict=True):
                label = None if (axis, row) in named else LABELS[row]
                axis.plot(at, [x[figure_name] for x in lines], color=colours[row], linewidth=1.2, label=label)
                named.add((axis, row))
    for axis, unit in zip(axes, ("PSNR, dB", "Fréchet distance"), strict=True):
        axis.set(xlabel="student updates", ylabel=f"{unit}, held-out clips")
    for row, style in (("teacher50", "-"), ("teacher4", ":")):  # its Fréchet distance on more clips is not comparable
        if row in scores:
            axes[0].axhline(scores[row][0]["psnr"], color="black", linestyle=style, linewidth=1, label=LABELS[row])
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--plot", type=Path, help="write the curves here, PNG")
    options = parser.parse_args(arguments)
    try:
        scores = read_scores(options.folders)
        print(table(scores))
        if options.json:
            context = read_records(options.folders[0] / "context.json")[0]
            del context["name"]
            write_records(options.json, records(scores, context))
        if options.plot:
            plot(options.folders, scores, options.plot)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
