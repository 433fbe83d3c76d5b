"""The commands: both stages, continued, exported, generated with; and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fvgen.cli import main
from fvgen.data.shards import ShardWriter
from fvgen.distill import checkpoint, run
from fvgen.distill.guards import GuardLimits, Guards
from fvgen.distill.logs import LOSSES, PROGRESS
from fvgen.distill.parallel import Parallel
from fvgen.distill.settings import TrainSettings
from fvgen.models.bundle import ModelBundle
from fvgen.pipeline import FVGenPipeline
from fvgen.recipes.presets import get_preset
from fvgen.sampling import ModelSampler
from fvgen.utils.errors import UserError

Run = Callable[..., tuple[int, str, str]]
WEIGHTS = Path("unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny = get_preset("tiny")
    spec = replace(
        tiny,
        index=replace(tiny.index, height=32, width=64, frames=3, portrait=False),
        unet={**tiny.unet, "model_channels": 32, "channel_mult": (1,), "attention_resolutions": (1,), "context_dim": 32},
        vae={**tiny.vae, "block_out_channels": (16, 16, 16, 16)},
        image_encoder={**tiny.image_encoder, "image_size": 64, "width": 32},
        image_projector={**tiny.image_projector, "input_dim": 32, "output_dim": 32, "dim": 32, "frames": 3},
    )
    directory = tmp_path_factory.mktemp("teacher") / "model"
    ModelBundle.random(spec).save_pretrained(directory)
    return directory


@pytest.fixture
def fvgen(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as left:
            status = int(left.code or 0)
        return status, *capsys.readouterr()

    return call


def command(teacher: Path, output: Path, *more: object) -> list[object]:
    small = ["--batch", 1, "--critic-updates", 1, "--window", 1, "--reuse", 100, "--validation-clips", 1, "--device", "cpu"]
    return ["distill", "--teacher", teacher, "--output", output, *small, *more]


def test_the_second_stage_renders_no_clip_again(
    fvgen: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fvgen.distill import synthetic

    made: list[list[int]] = []
    render = synthetic.synthetic_pairs

    def note(seeds: torch.Tensor, *rest: object) -> object:
        made.append(seeds.tolist())
        return render(seeds, *rest)

    monkeypatch.setattr(synthetic, "synthetic_pairs", note)
    status, _, err = fvgen(*command(teacher, tmp_path / "run", "--iterations", 1))
    assert status == 0, err
    assert len(made) == 1, "one block of worlds serves the few samples of both stages"


def test_from_teacher_to_video(fvgen: Run, teacher: Path, tmp_path: Path) -> None:
    output, student = tmp_path / "run", tmp_path / "student"
    status, out, err = fvgen(*command(teacher, output, "--iterations", 1, "--lr", 1e-2, "--warmup", 0))
    assert status == 0, err
    assert "finished" in out
    lines = [json.loads(line) for line in (output / LOSSES).read_text().splitlines()]
    assert [(r["stage"], r["update"]) for r in lines] == [(1, "critic"), (1, "student"), (2, "critic"), (2, "student")]
    assert {p.name for p in (output / "validation").iterdir()} == {"stage1-000001", "stage2-000001"}
    shown = {p.name for p in (output / "validation" / "stage2-000001").iterdir()}
    assert shown == {"clip0.mp4", "contact_sheet.png", "scores.json"}
    assert "calibration" in (output / PROGRESS).read_text()
    # stage 2 started with the student and the head of stage 1, its fake score with the teacher
    root = output / "checkpoints"
    for role in ("student", "head"):
        before, after = (load_file(root / name / f"{role}.safetensors") for name in ("stage1-000001", "stage2-000000"))
        assert all(torch.equal(before[k], after[k]) for k in before)
    fake, original = load_file(root / "stage2-000000" / "fake.safetensors"), load_file(teacher / WEIGHTS)
    assert all(torch.equal(fake[k], original[k]) for k in original)

    # nothing is left to do, but to remove what a killed process has left
    left = [output / name / ".file.partial-0" for name in (".", "validation", "checkpoints")]
    for path in left:
        path.write_bytes(b"half")
    status, out, err = fvgen(*command(teacher, output, "--iterations", 1, "--lr", 1e-2, "--warmup", 0))
    assert status == 0, err
    assert len((output / LOSSES).read_text().splitlines()) == 4
    assert not [path for path in left if path.exists()]

    for option, file in (("--ema", "ema"), ("--no-ema", "student")):
        status, _, err = fvgen("export-student", output, "--output", student, option, "--dtype", "float32", "--overwrite")
        assert status == 0, err
        stored, expected = load_file(student / WEIGHTS), load_file(root / "stage2-000001" / f"{file}.safetensors")
        assert all(torch.equal(stored[k], expected[k]) for k in expected)
    assert json.loads((student / "distillation.json").read_text())["run"]["settings"]["lr"] == 1e-2

    mixed = ("--output", student, "--dtype", "float32", "--overwrite", "--teacher-share", 0.25)
    assert fvgen("export-student", output, *mixed)[0] == 0
    stored, own = load_file(student / WEIGHTS), load_file(root / "stage2-000001/ema.safetensors")
    theirs = dict(ModelBundle.from_pretrained(teacher).unet.float().named_parameters())
    for key, x in own.items():
        torch.testing.assert_close(stored[key], 0.75 * x + 0.25 * theirs[key].detach(), rtol=1e-6, atol=1e-7)
    pipeline = FVGenPipeline.from_pretrained(student, "cpu")
    assert pipeline.bundle.index.sampler == "few_step"
    sampler = ModelSampler(pipeline.bundle)
    latents = sampler.few_step(sampler.condition(torch.rand(1, 3, 3, 32, 64)))
    assert latents.isfinite().all()


def test_a_stage_alone_and_the_regression(fvgen: Run, teacher: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    quick = ("--iterations", 1, "--validate-every", 0, "--method", "causvid")
    status, _, err = fvgen(*command(teacher, first, *quick, "--stage", 1))
    assert status == 0, err
    assert len(list((first / "trajectories").iterdir())) >= 1
    assert fvgen(*command(teacher, second, *quick, "--stage", 2))[0] == 2
    status, _, err = fvgen(*command(teacher, second, *quick, "--stage", 2, "--from", first))
    assert status == 0, err
    start, end = load_file(second / "checkpoints/stage2-000000/student.safetensors"), checkpoint.latest(first / "checkpoints")
    assert all(torch.equal(start[k], x) for k, x in load_file(end / "student.safetensors").items())


def test_time_is_up_and_it_goes_on(fvgen: Run, teacher: Path, tmp_path: Path) -> None:
    quick = ("--validate-every", 0, "--method", "no_stage_one", "--log-every", 1)
    status, out, err = fvgen(*command(teacher, tmp_path / "run", *quick, "--iterations", 1000, "--minutes", 1e-6))
    assert status == 0, err
    assert "goes on" in out
    status, out, err = fvgen(*command(teacher, tmp_path / "run", *quick, "--iterations", 2))
    assert status == 0, err
    lines = (tmp_path / "run" / LOSSES).read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 0, 1, 1]


def test_a_guard_ends_with_its_own_status(fvgen: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = run.distill
    strict = Guards(GuardLimits(window=1, std_ratio=1.0001))
    monkeypatch.setattr(run, "distill", lambda *arguments: original(*arguments, guards=lambda: strict))
    status, _, err = fvgen(*command(teacher, tmp_path / "run", "--iterations", 1, "--validate-every", 0))
    assert status == 3
    assert "standard deviation" in err
    assert "Traceback" not in err
    stopped = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert "standard deviation" in stopped["reason"]
    checkpoint.read_tensors(Path(stopped["checkpoint"]), "student")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "free some space"),
        (torch.OutOfMemoryError("CUDA out of memory"), "--micro-batch"),
    ],
)
def test_a_full_machine_is_told(
    error: Exception, words: str, fvgen: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save", full)
    status, _, err = fvgen(*command(teacher, tmp_path / "run", "--iterations", 1))
    assert status == 2
    assert words in err
    assert "Traceback" not in err


def test_dry_run(fvgen: Run, tmp_path: Path) -> None:
    status, out, err = fvgen(
        "distill", "--recipe", "viewcrafter_512", "--dry-run", "--output", tmp_path / "run", "--device", "cpu"
    )
    assert status == 0, err
    assert not (tmp_path / "run").exists()
    # 1.44e9 parameters: 16 bytes each for two trained networks, 4 for the average
    figures = {line.rsplit(maxsplit=4)[0].strip(): float(line.split()[-4]) for line in out.splitlines() if "per GPU" in line}
    parameters = figures["running average"] / 4
    assert figures["student, fake score"] == pytest.approx(2 * 16 * parameters, abs=0.1)
    assert figures["teacher"] == pytest.approx(2 * parameters, abs=0.01)
    assert "DistributionMatching, 5000 iterations of 5 critic updates + 1" in out


def write_clips(folder: Path, latents: tuple[int, ...], tokens: int) -> None:
    """A finished set of one clip for the small teacher, but for the shape of its latents and its image tokens."""
    folder.mkdir(parents=True)
    (folder / "info.json").write_text("{}")
    writer, frames = ShardWriter(folder, 1), latents[1]
    clip = {"clean": torch.zeros(latents), "render": torch.zeros(latents), "image_tokens": torch.zeros(tokens, 32)}
    clip |= {"fps": torch.tensor(7), "world_from_cam": torch.zeros(frames, 4, 4), "K": torch.zeros(frames, 3, 3)}
    writer.write(0, [clip], {}, {})
    writer.write_constants({"text_tokens": torch.zeros(77, 32), "uncond_context": torch.zeros(77 + tokens, 32)})
    writer.finish()


@pytest.mark.parametrize(
    ("latents", "tokens", "words"), [((8, 3, 4, 4), 48, "have clean latents"), ((8, 3, 4, 8), 16, "have a context")]
)
def test_clips_that_do_not_fit_leave_the_place_free(
    fvgen: Run, teacher: Path, tmp_path: Path, latents: tuple[int, ...], tokens: int, words: str
) -> None:
    write_clips(tmp_path / "wrong", latents, tokens)
    write_clips(tmp_path / "right", (8, 3, 4, 8), 48)
    place = tmp_path / "runs" / "new"
    quick = ("--iterations", 1, "--validate-every", 0, "--method", "no_stage_one")
    status, _, err = fvgen(*command(teacher, place, *quick, "--data", tmp_path / "wrong"))
    assert status == 2
    assert words in err
    assert not place.parent.exists()
    status, _, err = fvgen(*command(teacher, place, *quick, "--data", tmp_path / "right"))
    assert status == 0, err


def test_forward_calls_that_cannot_be_dealt_out(teacher: Path, tmp_path: Path) -> None:
    settings, four = TrainSettings("tiny", batch=4, micro_batch=2), Parallel(0, 4, torch.device("cpu"))
    assert settings.calls(2) == 1
    with pytest.raises(UserError, match="--micro-batch 1"):
        run.distill(settings, run.RunOptions(tmp_path / "new", "teacher"), ModelBundle.from_pretrained(teacher), four)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--teacher", "nowhere"], "there is no model 'nowhere'"),
        (["--teacher", "{empty}"], "is not a model directory"),
        (["--recipe", "viewcrafter_512"], "is a tiny, not a viewcrafter_512; give --recipe or --teacher"),
        (["--wandb"], "pip install wandb"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    fvgen: Run, teacher: Path, tmp_path: Path, options: list[str], words: str, dry: list[str]
) -> None:
    more = [option.format(empty=tmp_path) for option in options]
    status, out, err = fvgen(*command(teacher, tmp_path / "run", *more, *dry))
    assert (status, out) == (2, "")
    assert words in err
    assert not list(tmp_path.iterdir())


BAD = {
    "another run": ("holds a run with another", ["--lr", 0.5]),
    "no such stage": ("leave --stage out", ["--method", "dmd2", "--stage", 2]),
    "iterations": ("--iterations", ["--iterations", 1, 2, 3]),
    "micro": ("divisor", ["--micro-batch", 2, "--batch", 3]),
    "recipe": ("is a tiny", ["--recipe", "viewcrafter_512"]),
    "data": ("no data folder", ["--data", "{new}", "--output", "{new}"]),
    "no clips": ("no prepared clips", ["--data", "{empty}", "--output", "{new}"]),
    "damaged record": ("cannot be read", ["--output", "{damaged}"]),
    "from": ("neither a training run", ["--from", "{empty}", "--output", "{new}"]),
    "from another model": ("does not fit the model", ["--stage", 2, "--from", "{foreign}", "--output", "{new}"]),
    "shard": ("torchrun", ["--shard"]),
    "wandb": ("pip install wandb", ["--wandb"]),
    "method": ("invalid choice", ["--method", "dmd3"]),
    "something else": ("something else", ["--output", "{thesis}"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, fvgen: Run, teacher: Path, tmp_path: Path) -> None:
    words, more = BAD[case]
    places = {
        "new": tmp_path / "new",
        "empty": tmp_path / "empty",
        "thesis": tmp_path / "thesis",
        "damaged": tmp_path / "damaged",
        "foreign": tmp_path / "foreign",
    }
    for name in ("empty", "thesis", "run", "damaged", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "foreign" / checkpoint.STATE).write_text(json.dumps({"trained": ["student"]}))
    save_file({"of.another.network": torch.zeros(1)}, tmp_path / "foreign" / "student.safetensors")
    (tmp_path / "damaged" / "run.json").write_text("[]")
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    record = {"settings": {"lr": 5e-5}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    more = [m.format(**places) if isinstance(m, str) else m for m in more]
    status, out, err = fvgen(*command(teacher, tmp_path / "run", *more))
    assert status == 2, err
    assert words in err
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "new").exists()


def test_export_refuses(fvgen: Run, tmp_path: Path) -> None:
    status, _, err = fvgen("export-student", tmp_path, "--output", tmp_path / "new")
    assert status == 2
    assert "neither a training run" in err
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    status, _, err = fvgen("export-student", tmp_path, "--output", tmp_path / "file" / "deep")
    assert status == 2
    assert "cannot write into" in err
