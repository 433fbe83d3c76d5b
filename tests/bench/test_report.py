from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fvgen.bench.plots import clips_of, sweep
from fvgen.bench.report import report_text, write_report
from fvgen.utils.errors import UserError
from tests.bench.conftest import ORIGIN, timed

CLIP = {
    "suite": "sampler",
    "model": "tiny",
    "weights": "trained",
    "runner": "engine",
    "frames": 16,
    "image_size": [160, 256],
}
STAGES = {"render": 1.2, "vae_encode": 3.0, "image_tower": 0.9, "noise": 0.2, "unet_forward": 5.8, "step1": 6.0, "step2": 6.0}
STAGES |= {"vae_decode": 9.0, "clip": 26.0}


def kernel(op: str, ms: float, fraction: float, compiled: float | None) -> dict:
    rate = {"copy_bytes_per_second": 4e12, "bandwidth_fraction": fraction, "bytes": 10**8, "flops": 10**9}
    other = {"median_ms": compiled} if compiled else {"median_ms": None, "failed": "Unsupported: a reason"}
    others = {"reference": {"median_ms": 5 * ms}, "torch.compile": other, "library": {"median_ms": 0.5 * ms}}
    facts = {
        "suite": "kernels",
        "op": op,
        "case": "16x320x512",
        "dtype": "bfloat16",
        "path": "fast",
        "flops_per_second": 1e12 / ms,
    }
    return timed(f"kernel_{op}_16x320x512_ms", ms, **facts, **rate, others=others)


def raster(views: int, points: int, backward: bool) -> dict:
    facts = {"suite": "raster", "views": views, "points": points, "image_size": [320, 512], "points_per_pixel": 10}
    name = f"raster_{'backward_' if backward else ''}{views}x{points}_ms"
    return timed(name, 1e-7 * views * points, **facts, backward=backward, extra_memory_bytes=136_000_000, others={})


@pytest.fixture
def records() -> list[dict]:
    state = {"sm_mhz": [1980, 1755], "throttled": ["power cap"]}
    found = [
        {"name": "device_copy_bandwidth", "suite": "device", "value": 4000.0, "unit": "GB/s", **ORIGIN},
        {"name": "device_matmul_rate", "suite": "device", "value": 780.0, "unit": "TFLOP/s", **ORIGIN},
        kernel("geglu", 0.1, 0.8, 0.15) | {"gpu_state": state},
        kernel("norm", 0.2, 0.5, None),
        {
            "name": "kernel_bad_ms",
            "suite": "kernels",
            "op": "bad",
            "median_ms": None,
            "failed": "RuntimeError: no fast path",
            **ORIGIN,
        },
        *(raster(16, n * 100_000, b) for n in (1, 2, 4) for b in (False, True)),
        raster(4, 200_000, False),
        {"name": "train_tiny_clips_per_second", "suite": "train", "value": 280.0, "unit": "clips/s", **ORIGIN},
        {"name": "speedup_percent_tiny", **CLIP, "suite": "speedup", "value": 94.4, "unit": "%", **ORIGIN},
    ]
    for batch in (1, 4):
        for stage, ms in STAGES.items():
            memory = {"graph_memory_bytes": 3_210_000_000} if stage == "clip" else {}
            found.append(timed(f"{stage}_tiny_b{batch}_ms", ms * batch, **CLIP, batch=batch, stage=stage, steps=2, **memory))
        found.append({"name": f"clips_per_s_tiny_b{batch}", **CLIP, "batch": batch, "value": 38.5, "unit": "clips/s", **ORIGIN})
        found.append(
            {
                "name": f"clip_tiny_b{batch}_peak_gb",
                **CLIP,
                "batch": batch,
                "stage": "clip",
                "value": 18.1,
                "unit": "GB",
                **ORIGIN,
            }
        )
    found.append(timed("clip_tiny_offload_ms", 70.0, **CLIP, batch=1, stage="clip, offloaded"))
    seconds = {"median_s": 1.5, "p10_s": 1.25, "p90_s": 1.75, "unit": "s"}
    return [*found, {"name": "teacher50_tiny_s", **CLIP, "batch": 1, "stage": "teacher clip", "steps": 50, **seconds, **ORIGIN}]


def colours(picture: Path) -> int:
    image = Image.open(picture).convert("RGB")
    assert min(image.size) > 200
    return len(np.unique(np.asarray(image).reshape(-1, 3), axis=0))


def test_report_with_pictures(records, tmp_path):
    file = write_report(json.loads(json.dumps(records)), tmp_path / "new" / "report")
    pictures = {p.name for p in file.parent.glob("*.png")}
    assert pictures == {"waterfall.png", "batch_scaling.png", "bandwidth.png", "roofline.png", "raster_scaling.png"}
    for name in pictures:
        assert colours(file.parent / name) > 20, name
    text = file.read_text()
    assert all(f"]({name})" in text for name in pictures)
    for words in ("NVIDIA H200", "abc123", "power cap", "1755 to 1980 MHz", "0.15 (1.50 x)", "0.05 (0.50 x)", "94.4"):
        assert words in text, words
    for row in (
        "| teacher clip, 50 steps | 1500 | 1250 to 1750 |",
        "| 3.21 |",
        "| `clips_per_s_tiny_b4` | 38.5 | clips/s |",
        "| `clip_tiny_b1_peak_gb` | 18.1 | GB |",
    ):
        assert row in text, row
    assert "- `kernel_bad_ms`: RuntimeError: no fast path" in text
    assert "failed (Unsupported)" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)


def test_a_clip_is_made_of_its_stages(records):
    clips = clips_of(records)
    assert set(clips) == {("tiny", 1), ("tiny", 4)}
    for (_, batch), stages in clips.items():
        assert {s: r["median_ms"] for s, r in stages.items()} == {
            s: ms * batch for s, ms in STAGES.items() if s != "unet_forward"
        }


def test_only_what_was_measured_is_drawn(records, tmp_path):
    file = write_report([r for r in records if r.get("suite") == "train"], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"report.md"}
    text = file.read_text()
    assert "Training step" in text
    assert "Operators" not in text
    assert "not available" in text


def test_records_of_older_files(records):
    old = {"name": "raster_16x4M_576x1024_ms", "median_ms": 14.568, "points": 4128768, "image_size": [576, 1024]}
    assert "`raster_16x4M_576x1024_ms` | – | 4128768 | 576 x 1024" in report_text([old], {})


def test_a_sweep_varies_one_size(records):
    assert [x for x, _ in sweep(records, "points", backward=False)] == [100_000, 200_000, 400_000]
    assert [x for x, _ in sweep(records, "views", backward=False)] == [4, 16]
    assert [x for x, _ in sweep(records, "views", backward=True)] == [16]


def test_quick_figures_are_called_so(records):
    words = "measures nothing"
    assert words not in report_text(records, {})
    assert words in report_text([*records, {**records[0], "command": "fvgen bench raster --quick --json RESULT.json"}], {})


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="no records"):
        write_report([], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_report([timed("a", 1.0)], tmp_path / "file" / "deep")
