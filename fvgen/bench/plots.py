"""Pictures of a result: where a clip's time goes, operators below the roofline, and how times grow with the input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c564b")  # apart for colour-blind eyes
MARKERS = "osD^vP*X"
STAGES = {"render": 2, "vae_encode": 0, "image_tower": 5, "encode": 0, "noise": 6, "vae_decode": 3}  # -> colour; steps have 1
ASIDE = ("load", "first call", "fast clip", "teacher clip", "clip, offloaded", "unet_forward", None)  # no stages of a clip


def draw(records: Sequence[Record], folder: Path) -> dict[str, str]:
    """Draws what the records allow into ``folder``; file name -> caption, in the order of the report.

    Args:
        records: of one or more suites; failed ones are left out.
        folder: exists.
    """
    good = [r for r in records if not r.get("failed")]
    pictures: dict[str, tuple[str, Callable[[], Any] | None]] = {
        "waterfall.png": ("Where a clip's time goes, stage after stage.", _waterfall(good)),
        "batch_scaling.png": ("Time of a clip over the number of clips at once.", _batches(good)),
        "bandwidth.png": ("Share of this GPU's copy bandwidth that an operator reaches, beside torch.compile.", _bandwidth(good)),
        "roofline.png": ("Operators below the measured ceilings of this GPU.", _roofline(good)),
        "raster_scaling.png": ("Point rasterizer: each picture varies one size and keeps the others.", _raster(good)),
    }
    drawn = {}
    for name, (caption, make) in pictures.items():
        if make is None:
            continue
        figure = make()
        figure.savefig(folder / name, dpi=130, bbox_inches="tight", facecolor="white")
        _pyplot().close(figure)
        drawn[name] = caption
    return drawn


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11})
    return plt


def clips_of(records: Sequence[Record]) -> dict[tuple[str, int], dict[str, Record]]:
    """(model, batch) -> stage -> record of a time of the sampler, without loading, first clip, network alone and teacher."""
    clips: dict[tuple[str, int], dict[str, Record]] = {}
    for r in records:
        if r.get("suite") == "sampler" and r.get("stage") not in ASIDE and "median_ms" in r:
            clips.setdefault((r["model"], r["batch"]), {})[r["stage"]] = r
    return clips


def _waterfall(records: Sequence[Record]) -> Callable[[], Any] | None:
    clips = clips_of(records)
    first = {model: min(b for m, b in clips if m == model) for model, _ in clips}
    if not first:
        return None

    def make() -> Any:
        rows = [len(clips[key]) for key in first.items()]
        size = (9, 0.36 * sum(rows) + 1.1 * len(rows))
        figure, axes = _pyplot().subplots(len(rows), 1, figsize=size, squeeze=False, height_ratios=rows, layout="tight")
        for axis, (model, batch) in zip(axes[:, 0], first.items(), strict=True):
            stages = clips[model, batch]
            begin, total = 0.0, sum(r["median_ms"] for name, r in stages.items() if name != "clip")
            span = max([total, *(r["median_ms"] for r in stages.values())])
            for row, (name, r) in enumerate(stages.items()):
                whole = name == "clip"
                ms = r["median_ms"]
                left = 0.0 if whole else begin
                colour = "#444444" if whole else COLOURS[STAGES.get(name, 1)]
                axis.barh(row, ms, left=left, color=colour, height=0.75)
                share = "" if whole else f"  {100 * ms / total:.0f} %"
                axis.text(left + ms + 0.01 * span, row, f"{_short(ms)} ms{share}", va="center", fontsize=9)
                begin += 0.0 if whole else ms
            labels = ["whole clip" if name == "clip" else stage_label(name) for name in stages]
            axis.set_yticks(range(len(stages)), labels)
            axis.invert_yaxis()
            axis.set_xlim(0, 1.22 * span)
            r = stages.get("clip") or next(iter(stages.values()))
            height, width = r["image_size"]
            note = f"{r['frames']} frames, {width} x {height}, batch {batch}, {r['runner']}, {r['weights']}"
            axis.set_title(f"{model}: {note}", loc="left")
            axis.set_xlabel("milliseconds")
        return figure

    return make


def stage_label(stage: str) -> str:
    """A stage's name as text: "step1" to "step 1"."""
    return stage.replace("_", " ").replace("step", "step ")


def _batches(records: Sequence[Record]) -> Callable[[], Any] | None:
    clips = clips_of(records)
    models = {m: sorted(b for n, b in clips if n == m and "clip" in clips[m, b]) for m, _ in clips}
    models = {m: batches for m, batches in models.items() if len(batches) > 1}
    if not models:
        return None

    def make() -> Any:
        figure, axes = _pyplot().subplots(1, len(models), figsize=(4.6 * len(models) + 0.6, 3.4), squeeze=False, layout="tight")
        for axis, (model, batches) in zip(axes[0], models.items(), strict=True):
            per_clip = [clips[model, b]["clip"]["median_ms"] / b for b in batches]
            axis.plot(batches, per_clip, color=COLOURS[0], marker="o")
            for b, ms in zip(batches, per_clip, strict=True):
                axis.annotate(_short(ms), (b, ms), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=9)
            axis.set(title=model, xlabel="clips at once", ylabel="milliseconds per clip", ylim=(0, 1.2 * max(per_clip)))
            axis.set_xticks(batches)
            axis.grid(axis="y", alpha=0.3)
        return figure

    return make


def _kernels(records: Sequence[Record]) -> list[Record]:
    return [r for r in records if r.get("suite") == "kernels" and r.get("bandwidth_fraction")]


def _compiled_ms(record: Record) -> float | None:
    return record.get("others", {}).get("torch.compile", {}).get("median_ms")


def _bandwidth(records: Sequence[Record]) -> Callable[[], Any] | None:
    rows = _kernels(records)
    if not rows:
        return None

    def make() -> Any:
        figure, axis = _pyplot().subplots(figsize=(9, 0.27 * len(rows) + 1.2), layout="tight")
        ops = list(dict.fromkeys(r["op"] for r in rows))
        right = 1.0
        for row, r in enumerate(rows):
            own = r["bandwidth_fraction"]
            axis.barh(row, own, color=COLOURS[ops.index(r["op"]) % len(COLOURS)], height=0.72)
            compiled = _compiled_ms(r)
            theirs = None if not compiled else own * r["median_ms"] / compiled
            if theirs:
                axis.plot(theirs, row, marker="|", markersize=11, markeredgewidth=2.4, color="black", linestyle="none")
            right = max(right, own, theirs or 0.0)
            axis.text(1.0, row, f"{own:.2f}", va="center", ha="right", fontsize=8, transform=axis.get_yaxis_transform())
        axis.plot([], [], marker="|", markersize=11, markeredgewidth=2.4, color="black", linestyle="none", label="torch.compile")
        axis.axvline(1, color="grey", linestyle=":", linewidth=1, label="copy bandwidth")
        axis.set_yticks(range(len(rows)), [f"{r['op']}  {r['case']}" for r in rows], fontsize=8)
        axis.invert_yaxis()
        axis.margins(y=0.01)
        axis.set_xlim(0, 1.1 * right)
        axis.set_xlabel("least bytes / time / measured copy bandwidth")
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
        return figure

    return make


def _roofline(records: Sequence[Record]) -> Callable[[], Any] | None:
    rows = [r for r in _kernels(records) if r.get("flops") and r.get("bytes")]
    if not rows:
        return None
    peak = next((1e12 * r["value"] for r in records if r["name"] == "device_matmul_rate"), None)

    def make() -> Any:
        figure, axis = _pyplot().subplots(figsize=(8.5, 5.2), layout="tight")
        rate = rows[-1]["copy_bytes_per_second"]
        where = [r["flops"] / r["bytes"] for r in rows]
        low, high = min(where) / 3, max([*where, *([peak / rate] if peak else [])]) * 3
        ceiling = [min(rate * x, peak) if peak else rate * x for x in (low, (peak or rate * high) / rate, high)]
        axis.plot([low, (peak or rate * high) / rate, high], ceiling, color="black", linewidth=1.5)
        text = f"copy: {rate / 1e9:.0f} GB/s" + (f", matrix product: {peak / 1e12:.3g} TFLOP/s" if peak else "")
        axis.set_title(f"measured ceilings: {text}", loc="left")
        ops = list(dict.fromkeys(r["op"] for r in rows))
        for n, op in enumerate(ops):
            turn = n + n // len(COLOURS)  # operators of one colour differ in their marker
            style = {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[turn % len(MARKERS)], "linestyle": "none"}
            for r in (r for r in rows if r["op"] == op):
                x, own, compiled = r["flops"] / r["bytes"], r["flops_per_second"], _compiled_ms(r)
                if compiled:
                    theirs = own * r["median_ms"] / compiled
                    axis.plot([x, x], [own, theirs], color=style["color"], linewidth=0.7, alpha=0.6)
                    axis.plot(x, theirs, **{**style, "markerfacecolor": "white"})
                axis.plot(x, own, **style)
            axis.plot([], [], label=op, **style)
        axis.plot([], [], label="hollow: torch.compile", marker="o", markerfacecolor="white", color="black", linestyle="none")
        axis.set(xscale="log", yscale="log", xlabel="operations per byte (least work)", ylabel="operations per second")
        axis.grid(which="major", alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
        return figure

    return make


AXES: dict[str, tuple[str, Callable[[Record], Any]]] = {
    "points": ("points", lambda r: r["points"]),
    "views": ("views (frames of the clip)", lambda r: r["views"]),
    "pixels": ("pixels of an image", lambda r: r["image_size"][0] * r["image_size"][1]),
    "k": ("points blended in a pixel", lambda r: r["points_per_pixel"]),
}


def sweep(records: Sequence[Record], axis: str, backward: bool) -> list[tuple[float, Record]]:
    """The rasterizer's records that differ in one size only, in its order: the other sizes are the commonest there are."""
    rows = [r for r in records if r.get("suite") == "raster" and not r.get("failed") and r["backward"] == backward]
    for other in AXES:
        if other != axis and rows:
            read = AXES[other][1]
            common = Counter(read(r) for r in records if r.get("suite") == "raster").most_common(1)[0][0]
            rows = [r for r in rows if read(r) == common]
    return sorted({AXES[axis][1](r): r for r in rows}.items(), key=lambda pair: pair[0])


def _raster(records: Sequence[Record]) -> Callable[[], Any] | None:
    lines = {(a, b): found for a in AXES for b in (False, True) if len(found := sweep(records, a, b)) > 1}
    if not lines:
        return None

    def make() -> Any:
        plots = _pyplot()
        from matplotlib import ticker

        shown = [a for a in AXES if (a, False) in lines or (a, True) in lines]
        columns = min(2, len(shown))
        height = -(-len(shown) // columns)
        figure, axes = plots.subplots(height, columns, figsize=(4.8 * columns, 3.3 * height), squeeze=False, layout="tight")
        for spare in axes.flat[len(shown) :]:
            spare.set_visible(False)
        for axis, a in zip(axes.flat, shown, strict=False):
            seen: list[float] = []
            for backward, colour, label in ((False, COLOURS[0], "image"), (True, COLOURS[1], "gradients")):
                line = lines.get((a, backward), [])
                if not line:
                    continue
                seen += [r["median_ms"] for _, r in line]
                axis.plot([x for x, _ in line], [r["median_ms"] for _, r in line], color=colour, marker="o", label=label)
                theirs = [(x, ms) for x, r in line if (ms := r.get("others", {}).get("pytorch3d", {}).get("median_ms"))]
                seen += [ms for _, ms in theirs]
                if theirs:
                    axis.plot(*zip(*theirs, strict=True), color=colour, marker="s", linestyle=":", label=f"{label}, PyTorch3D")
            axis.set(xscale="log", xlabel=AXES[a][0], ylabel="milliseconds")
            if max(seen) > 3 * min(seen):
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
            else:
                axis.set_ylim(0, 1.15 * max(seen))
            ticks = sorted({x for backward in (False, True) for x, _ in lines.get((a, backward), [])})
            axis.set_xticks(ticks, [_count(x) for x in ticks])
            axis.minorticks_off()
            axis.grid(which="major", alpha=0.3)
        names = dict(zip(*reversed(axes.flat[0].get_legend_handles_labels()), strict=True))
        figure.legend(names.values(), names, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), frameon=False)
        return figure

    return make


def _count(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:g}"


def _short(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"
