from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.ablation_report import main
from fvgen.bench.record import read_records


def score(row: str, seed: int, psnr: float, **more: object) -> dict[str, object]:
    figures = {"psnr_covered": psnr + 3, "psnr_uncovered": psnr - 1, "psnr_error": 0.1, "ssim": 0.6, "frechet": 1.5}
    return {"row": row, "seed": seed, "psnr": psnr, **figures, "clips": 256, "real_psnr": {"desk": psnr - 2}, **more}


def folder(path: Path, scores: list[dict[str, object]]) -> Path:
    path.mkdir()
    (path / "scores.json").write_text(json.dumps(scores))
    (path / "context.json").write_text(json.dumps([{"name": "context", "gpu": "one", "command": "run"}]))
    return path


def test_seeds_of_several_folders_are_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = score("teacher50", 0, 20.5)
    guided = [score(f"teacher50_guidance_{w}", 0, 20.0) for w in ("7.5", "12")]
    one = folder(
        tmp_path / "a", [*guided[::-1], teacher, score("student", 0, 20.25), score("fvgen", 0, 20.0), score("dmd2", 0, 19.0)]
    )
    two = folder(tmp_path / "b", [teacher, score("fvgen", 2, 21.0), score("fvgen", 1, 22.0, stopped="too dark")])
    main([str(one), str(two), "--json", str(tmp_path / "r.json")])
    found = {r["name"]: r for r in read_records(tmp_path / "r.json")}
    assert set(found) == {"tiny_psnr_teacher50", "tiny_psnr_teacher50_guidance_7.5", "tiny_psnr_teacher50_guidance_12"} | {
        "ablation_fvgen_psnr",
        "tiny_psnr_student4",
        "ablation_dmd2_psnr",
    }
    full = found["ablation_fvgen_psnr"]
    assert full["value"] == full["psnr"] == pytest.approx(21.0)
    assert full["psnr_deviation"] == pytest.approx(1.0)
    assert full["seeds"] == [0, 1, 2]
    assert full["real_psnr"] == {"desk": pytest.approx(19.0)}
    assert full["stopped"] == ["too dark"]
    assert full["gpu"] == "one"
    assert found["tiny_psnr_student4"]["value"] == pytest.approx(20.25)
    assert "psnr_deviation" not in found["ablation_dmd2_psnr"]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8  # heads, rule and six rows, the teacher once
    assert lines[3].startswith("| teacher, DDIM, 50 steps, guidance 7.5 | 1 |")
    assert "| full method | 3 | 21.00 ± 1.00 |" in lines[6]


def test_curves_are_drawn(tmp_path: Path) -> None:
    one = folder(tmp_path / "a", [score("teacher50", 0, 20.5), score("fvgen", 0, 20.0)])
    for run, stage in (("stage_one_only-0", 1), ("fvgen-0", 2)):
        (one / run).mkdir()
        lines = [{"stage": stage, "iteration": i, "psnr": 20.0 + i, "frechet": 1.0} for i in (1, 2)]
        (one / run / "curve.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    main([str(one), "--plot", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_a_folder_without_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "has no scores.json" in capsys.readouterr().err
