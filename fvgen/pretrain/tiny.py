"""The bundled ``tiny`` model from nothing but a seed: VAE, networks, model directory, loss curves and held-out scores."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fvgen.evaluation.heldout import held_out_scores
from fvgen.evaluation.provenance import provenance
from fvgen.io.durable import is_partial, remove_partial, write_json_durably
from fvgen.models.bundle import ModelBundle
from fvgen.models.spec import ModelSpec
from fvgen.pretrain.common import plot_curves
from fvgen.pretrain.teacher import CHECKPOINT_FILE, TeacherRecipe, train_teacher
from fvgen.pretrain.vae import VaeRecipe, train_vae
from fvgen.recipes.presets import get_preset
from fvgen.utils.errors import UserError

CHECKPOINT_MINUTES = 5.0
RECORD_FILE, SCORES_FILE = "training.json", "scores.json"


def train_tiny(
    output: str | os.PathLike[str],
    device: str,
    *,
    seed: int = 0,
    vae_steps: int = VaeRecipe.steps,
    teacher_steps: int = TeacherRecipe.steps,
    vae_minutes: float | None = None,
    teacher_minutes: float | None = None,
    vae_from: str | os.PathLike[str] | None = None,
    compile: bool | None = None,
) -> dict[str, float]:
    """Trains the ``tiny`` model; see :func:`train_model` for what it writes.

    Args:
        output: new or empty directory, or that of an interrupted run with the same settings, which is continued.
        device: "cpu" or "cuda".
        seed: of weights, worlds and noise, 0 or more.
        vae_steps, teacher_steps: length of the two runs.
        vae_minutes, teacher_minutes: end a run earlier; then the number of steps depends on the machine.
        vae_from: a VAE or model directory whose VAE is used instead of training one.
        compile: fuse the ray caster with torch.compile; None does so on a GPU.

    Returns:
        the held-out scores, see :func:`fvgen.evaluation.heldout.held_out_scores`.

    Raises:
        UserError: bad settings, no such device, or a directory that holds something else.
    """
    if device not in ("cpu", "cuda"):
        raise UserError(f"training runs on cpu or cuda, not on {device!r}; give one of them")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no usable GPU on this machine; use --device cpu")
    if seed < 0 or vae_steps < 1 or teacher_steps < 1 or any(m is not None and m <= 0 for m in (vae_minutes, teacher_minutes)):
        raise UserError("steps and minutes must be positive and the seed not negative; correct the settings")
    vae_recipe = None if vae_from is not None else VaeRecipe(steps=vae_steps, minutes=vae_minutes, seed=seed)
    teacher_recipe = TeacherRecipe(steps=teacher_steps, minutes=teacher_minutes, seed=seed)
    compile = device == "cuda" if compile is None else compile
    return train_model(get_preset("tiny"), vae_recipe, teacher_recipe, Path(output), device, vae_from=vae_from, compile=compile)


def train_model(
    spec: ModelSpec,
    vae_recipe: VaeRecipe | None,
    teacher_recipe: TeacherRecipe,
    output: Path,
    device: str,
    *,
    vae_from: str | os.PathLike[str] | None = None,
    compile: bool = False,
    score_clips: int = 64,
) -> dict[str, float]:
    """Trains the networks of ``spec``.

    Leaves in ``output``: ``model/`` (float16), ``vae/``, ``training.json`` (settings, steps, minutes, versions), the logs
    ``vae.jsonl`` and ``teacher.jsonl``, ``curves.png``, and ``scores.json`` (held-out scores of the model as saved). Directories
    appear when they are complete. Calling this again after an interruption goes on with what is missing; the teacher run goes on
    from its last state, about five minutes back at most.

    Args: see :func:`train_tiny`; without ``vae_recipe``, ``vae_from`` names the VAE. ``score_clips``: held-out clips.

    Raises:
        UserError: a VAE that does not fit, or a directory that holds something else.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the loss curves need matplotlib; install it with pip install matplotlib")
    settings = {
        "preset": spec.index.preset,
        "vae": asdict(vae_recipe) if vae_recipe else {"from": str(vae_from)},
        "teacher": asdict(teacher_recipe),
    }
    settings = json.loads(json.dumps(settings))  # as it will be read back
    if vae_recipe is None:
        _load_vae(Path(str(vae_from)), spec)
    _claim(output, settings)
    if vae_recipe is not None and not (output / "vae").is_dir():
        train_vae(vae_recipe, output, device, compile, spec=spec)
    if not (output / "model").is_dir():
        bundle = ModelBundle.random(spec, teacher_recipe.seed)
        bundle.vae = _load_vae(output / "vae" if vae_recipe else Path(str(vae_from)), spec)
        networks = train_teacher(
            teacher_recipe,
            bundle.vae,
            bundle.prompt,
            bundle.empty,
            output,
            device,
            compile,
            spec=spec,
            checkpoint_minutes=CHECKPOINT_MINUTES,
            resume=True,
        )
        for name in ("unet", "image_encoder", "image_projector"):
            setattr(bundle, name, getattr(networks, name))
        bundle.save_pretrained(output / "model", torch.float16)
        (output / CHECKPOINT_FILE).unlink(missing_ok=True)
    logs = [log for log in (output / "vae.jsonl", output / "teacher.jsonl") if log.is_file()]
    plot_curves(logs, output / "curves.png")
    bundle = ModelBundle.from_pretrained(output / "model", device)  # what was saved, with its rounding
    scores = held_out_scores(bundle, score_clips)
    where = provenance(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    runs = {log.stem: _length(log) for log in logs}
    record = {"settings": settings, "runs": runs, "parameters": bundle.parameter_counts(), **where}
    write_json_durably(output / RECORD_FILE, record, indent=2)
    write_json_durably(output / SCORES_FILE, {"clips": score_clips, "psnr_db": scores, **where}, indent=2)
    return scores


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Makes ``output`` the directory of this run, or raises UserError when it belongs to something else."""
    record = output / RECORD_FILE
    if record.is_file():
        try:
            found = json.loads(record.read_text()).get("settings")
        except (ValueError, AttributeError) as error:
            raise UserError(f"{record} cannot be read ({error}); choose another output directory") from error
        if (output / SCORES_FILE).is_file():
            raise UserError(f"{output} holds a finished run; choose another output directory")
        if found != settings:
            raise UserError(f"{output} holds a run with other settings; repeat them to continue it, or choose another directory")
    elif output.exists() and not (output.is_dir() and all(map(is_partial, output.iterdir()))):
        raise UserError(f"{output} holds something else and will not be overwritten; choose another output directory")
    else:
        output.mkdir(parents=True, exist_ok=True)
        write_json_durably(record, {"settings": settings}, indent=2)
    remove_partial(output)


def _load_vae(directory: Path, spec: ModelSpec) -> nn.Module:
    """The float32 VAE of a VAE or model directory; UserError when there is none or it has another shape."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    place = directory / "vae" if (directory / "vae").is_dir() else directory
    if not (place / "config.json").is_file():
        raise UserError(f"there is no VAE in {directory}; give the directory of a VAE or of a model")
    try:
        vae = AutoencoderKL.from_pretrained(place, torch_dtype=torch.float32, local_files_only=True)
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"the VAE in {place} cannot be loaded ({str(error).splitlines()[0]}); train or save it again") from error
    for name in ("block_out_channels", "latent_channels", "layers_per_block"):
        wanted, found = spec.vae[name], vae.config[name]
        if (list(found) if isinstance(found, list | tuple) else found) != (list(wanted) if isinstance(wanted, tuple) else wanted):
            raise UserError(f"the VAE in {place} has {name} {found}, the model needs {wanted}; give a VAE trained for it")
    return vae


def _length(log: Path) -> dict[str, float]:
    """Steps done and minutes taken, from the last line of a log."""
    last = json.loads(log.read_text().splitlines()[-1])
    return {"steps": last["step"], "minutes": round(last["seconds"] / 60, 2)}
