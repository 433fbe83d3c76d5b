"""Real processes, killed with SIGKILL, then continued: the losses are those of a run that was never killed, to the last bit."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fvgen.distill import checkpoint
from fvgen.distill.logs import LOSSES
from fvgen.utils.errors import UserError

from .small import CADENCE, in_process, killed_while_writing, small_trainer, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four iterations that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_process(train, folder) == 0
    return folder


def same_end(folder: Path, whole: Path) -> None:
    assert (folder / LOSSES).read_bytes() == (whole / LOSSES).read_bytes()
    ours, theirs = (checkpoint.latest(f / "checkpoints") for f in (folder, whole))
    assert ours.name == theirs.name == "stage2-000004"
    for file in theirs.glob("*.safetensors"):
        expected = load_file(file)
        found = load_file(ours / file.name)
        assert all(torch.equal(found[k], expected[k]) for k in expected), file.name


def test_the_run_leaves_one_line_per_update(whole: Path) -> None:
    lines = (whole / LOSSES).read_text().splitlines()
    assert len(lines) == 4 * (1 + 1)
    names = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert names == ["latest", "stage2-000002", "stage2-000004"]  # keep = 2


@pytest.mark.parametrize("update", [0, 3, 7])
def test_killed_between_updates(update: int, whole: Path, tmp_path: Path) -> None:
    assert in_process(train, tmp_path, dies_at=update) == -signal.SIGKILL
    assert in_process(train, tmp_path) == 0
    same_end(tmp_path, whole)


# A checkpoint of three networks is 8 files, 10 flushes, a rename, a flush, then the pointer: flush, replace, flush: 23 in all.
# The third also removes the oldest, with a rename. So: in the first; and in the third a file, rename, pointer, removal.
@pytest.mark.parametrize("event", [3, 49, 65, 68, 70])
def test_killed_while_writing(event: int, whole: Path, tmp_path: Path) -> None:
    assert in_process(killed_while_writing, event, tmp_path) == -signal.SIGKILL
    root = tmp_path / "checkpoints"
    found = checkpoint.latest(root)
    if found is not None:  # whatever the pointer names is complete
        state = checkpoint.read_state(found)
        for file in state["files"]:
            checkpoint.read_tensors(found, file)
    assert in_process(train, tmp_path) == 0
    same_end(tmp_path, whole)
    left = {p.name for p in root.iterdir()}
    assert {"latest", "stage2-000002", "stage2-000004"} <= left  # the oldest stays where only its removal was missed
    assert not [name for name in left if name.startswith(".")]


@pytest.mark.slow
def test_killed_at_every_rename_of_a_continued_run(whole: Path, tmp_path: Path) -> None:
    """The run begins in a folder whose pointer names its first checkpoint already."""
    begun = tmp_path / "begun"
    assert in_process(train, begun, dies_at=0) == -signal.SIGKILL
    assert checkpoint.latest(begun / "checkpoints").name == "stage2-000000"
    for event in range(1, 100):
        folder = tmp_path / str(event)
        shutil.copytree(begun, folder)
        status = in_process(killed_while_writing, event, folder, renames_only=True)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert in_process(train, folder) == 0, f"killed at rename {event}"
        same_end(folder, whole)
    assert event > 5  # two checkpoints, two pointers, a removal


@pytest.mark.parametrize("old_is_whole", [True, False])
def test_a_checkpoint_between_two_renames_is_found(old_is_whole: bool, tmp_path: Path) -> None:
    """The pointer names a checkpoint that was moved away before its replacement took its place."""
    trainer = small_trainer(tmp_path)
    path = trainer.save()
    trainer.close()
    root, expected = path.parent, load_file(path / "student.safetensors")
    shutil.copytree(path, root / ".part-stage2-000000")
    path.rename(root / ".old-stage2-000000")
    if not old_is_whole:
        (root / ".old-stage2-000000" / "student.safetensors").unlink()
    assert load_file(checkpoint.latest(root) / "student.safetensors").keys() == expected.keys()
    checkpoint.clean_up(root)
    assert sorted(p.name for p in root.iterdir()) == ["latest", "stage2-000000"]
    assert checkpoint.latest(root) == path
    found = load_file(path / "student.safetensors")
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_a_checkpoint_is_replaced_without_a_moment_in_which_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = small_trainer(tmp_path)
    trainer.save()
    root, seen = tmp_path / "checkpoints", []
    for name in ("rename", "replace"):
        original = getattr(os, name)

        def watched(*arguments: object, original: Callable[..., None] = original) -> None:
            original(*arguments)
            found = checkpoint.latest(root)
            seen.append(found)
            for file in checkpoint.read_state(found)["files"]:
                checkpoint.read_tensors(found, file)

        monkeypatch.setattr(os, name, watched)
    trainer.save()
    trainer.close()
    assert len(seen) >= 3


@pytest.mark.parametrize(("stage", "updates"), [(1, 2), (2, 3)])
def test_resumes_at_any_phase(stage: int, updates: int, tmp_path: Path) -> None:
    """The phase of the update ratio is part of the state; what an update leaves in the gradients is not.

    In stage 1 the student's loss reaches the head, whose next update must not see it.
    """
    trainer = small_trainer(tmp_path, stage=stage)
    for _ in range(updates):
        trainer.advance()
    trainer.save()
    assert (trainer.iteration, trainer.phase) == (1, updates - 2)
    other = small_trainer(tmp_path, stage=stage)
    assert (other.iteration, other.phase) == (1, updates - 2)
    for t in (trainer, other):
        for _ in range(2):
            t.advance()
        t.close()
    for role, module in trainer.roles.trained.items():
        for a, b in zip(module.parameters(), other.roles.trained[role].parameters(), strict=True):
            assert torch.equal(a, b), role


def test_the_mean_of_the_weights_resumes(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, weight_mean=True)
    for _ in range(4):
        trainer.advance()
    trainer.save()
    trainer.close()
    other = small_trainer(tmp_path, weight_mean=True)
    assert other.weight_mean.value == trainer.weight_mean.value
    other.close()


def test_a_log_cut_short_is_mended(tmp_path: Path, whole: Path) -> None:
    assert in_process(train, tmp_path, iterations=2) == 0
    with (tmp_path / LOSSES).open("a") as file:
        file.write('{"stage": 2, "iter')
    assert in_process(train, tmp_path) == 0
    same_lines = (tmp_path / LOSSES).read_bytes() == (whole / LOSSES).read_bytes()
    assert same_lines


def test_damaged_checkpoints_are_told(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path)
    path = trainer.save()
    (path / "student.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="earlier checkpoint"):
        trainer.restore(path)
    (tmp_path / "checkpoints" / checkpoint.LATEST).write_text("stage2-000009\n")
    with pytest.raises(UserError, match="stage2-000000"):
        checkpoint.latest(tmp_path / "checkpoints")
    shutil.rmtree(path)
    with pytest.raises(UserError, match="begins anew"):
        checkpoint.latest(tmp_path / "checkpoints")
    assert CADENCE.keep == 2
