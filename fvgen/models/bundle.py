"""A complete model on disk and in memory: four networks, two prompt embeddings and an index.

model_index.json            kind, preset, sizes, sampling defaults
unet/ vae/ image_encoder/ image_projector/      config.json, diffusion_pytorch_model.safetensors
prompt.safetensors          prompt [77, D], empty [77, D]

Or, where only the UNet differs from another model's, that difference; see ``difference.py``.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fvgen.io.durable import whole_folder
from fvgen.utils.errors import UserError

from . import difference
from .spec import COMPONENTS, ModelIndex, ModelSpec

KIND = "fvgen"
INDEX_FILE, PROMPT_FILE, WEIGHTS_FILE = "model_index.json", "prompt.safetensors", "diffusion_pytorch_model.safetensors"
_TEXT_TOKENS = 77


def component_class(name: str) -> Any:
    """The class of a component; imported here because diffusers is slow to import."""
    if name == "vae":
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        return AutoencoderKL
    from .clip import ClipVisionTower
    from .image_projector import ImageProjector
    from .unet import VideoUNet

    return {"unet": VideoUNet, "image_encoder": ClipVisionTower, "image_projector": ImageProjector}[name]


def build_component(name: str, arguments: dict[str, Any]) -> Any:
    """A component with fresh weights."""
    from .vae import make_vae

    return make_vae(**arguments) if name == "vae" else component_class(name)(**arguments)


@dataclass
class ModelBundle:
    """Everything inference needs.

    Attributes:
        index: sizes and sampling defaults.
        unet: ``VideoUNet``.
        vae: diffusers ``AutoencoderKL``.
        image_encoder: ``ClipVisionTower``.
        image_projector: ``ImageProjector``.
        prompt, empty: ``[77, D]`` text tokens of the fixed and of the empty prompt.
    """

    index: ModelIndex
    unet: Any
    vae: Any
    image_encoder: Any
    image_projector: Any
    prompt: Tensor
    empty: Tensor

    @staticmethod
    def random(spec: ModelSpec, seed: int = 0) -> ModelBundle:
        """Fresh weights and prompt embeddings that depend on ``seed`` only; the global random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = {name: build_component(name, getattr(spec, name)).eval() for name in COMPONENTS}
            prompt, empty = torch.randn(2, _TEXT_TOKENS, spec.context_dim).unbind(0)
        return ModelBundle(spec.index, prompt=prompt, empty=empty, **parts)

    @staticmethod
    def from_pretrained(
        directory: str | os.PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> ModelBundle:
        """Read a model directory; networks are in eval mode.

        Raises:
            UserError: it is no model directory, is of another kind, or a part of it is missing or does not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        root = Path(directory)
        index = read_index(root)
        if (root / difference.FILE).is_file():
            bundle = ModelBundle.from_pretrained(difference.base_directory(root))
            difference.add_difference(bundle.unet, root)
            bundle.index = index
            return bundle.to(device, dtype)
        missing = [f"{name}/{file}" for name in COMPONENTS for file in ("config.json", WEIGHTS_FILE)] + [PROMPT_FILE]
        missing = [part for part in missing if not (root / part).is_file()]
        if missing:
            raise UserError(f"the model directory {root} is incomplete: {', '.join(missing)} missing; save or download it again")
        parts = {}
        for name in COMPONENTS:
            try:
                parts[name] = _cast(_load(name, root / name), device, dtype).eval()
            except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
                raise UserError(f"the {name} in {root} cannot be loaded ({str(error).splitlines()[0]}); save it again") from error
        try:
            prompts = load_file(root / PROMPT_FILE)
        except SafetensorError as error:
            raise UserError(f"{root / PROMPT_FILE} cannot be loaded ({error}); save the model again") from error
        if not {"prompt", "empty"} <= set(prompts):
            raise UserError(f"{root / PROMPT_FILE} must hold the tensors prompt and empty, has {sorted(prompts)}")
        prompt, empty = (prompts[k].to(device=device, dtype=dtype) for k in ("prompt", "empty"))
        return ModelBundle(index, prompt=prompt, empty=empty, **parts)

    def save_pretrained(self, directory: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write a model directory: first beside its place, then renamed, so that it is never there in part.

        Args:
            directory: is created; an earlier model directory is replaced.
            dtype: type of the stored floating-point weights, None to keep theirs.

        Raises:
            UserError: the directory holds something else than a model.
        """
        root = Path(directory)
        if root.exists() and not (root / INDEX_FILE).is_file() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"{root} is not a model directory and will not be overwritten; choose another place")
        root.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(root) as new:
            self._write(new, dtype)

    def _write(self, root: Path, dtype: torch.dtype | None) -> None:
        for name in COMPONENTS:
            module = getattr(self, name)
            module.save_config(root / name)
            _forget_origin(root / name / "config.json")
            _save(module.state_dict(), root / name / WEIGHTS_FILE, dtype)
        _save({"prompt": self.prompt, "empty": self.empty}, root / PROMPT_FILE, dtype)
        index = {"kind": KIND, **self.index.to_dict()}
        (root / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ModelBundle:
        """Move or cast every part in place; returns itself."""
        for name in COMPONENTS:
            _cast(getattr(self, name), device, dtype)
        self.prompt, self.empty = (x.to(device=device, dtype=dtype) for x in (self.prompt, self.empty))
        return self

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per component."""
        return {name: sum(p.numel() for p in getattr(self, name).parameters()) for name in COMPONENTS}


def read_index(directory: str | os.PathLike[str]) -> ModelIndex:
    """The index of a model directory, without loading any network.

    Raises:
        UserError: there is none, it cannot be read, or it is of another kind.
    """
    path = Path(directory) / INDEX_FILE
    if not path.is_file():
        raise UserError(f"{Path(directory)} is not a model directory: it has no {INDEX_FILE}")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); save the model again") from error
    kind = values.pop("kind", values.get("_class_name", "unknown")) if isinstance(values, dict) else "unknown"
    if kind != KIND:
        raise UserError(f"{Path(directory)} holds a model of kind {kind!r}, not {KIND!r}; give a directory saved by fvgen")
    return ModelIndex.from_dict(values)


def _cast(module: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    # diffusers' own ``to`` warns about modules to keep in float32, of which there are none here.
    return nn.Module.to(module, device=device, dtype=dtype)


def _forget_origin(config: Path) -> None:
    """Drop the folder a network was loaded from: it means nothing elsewhere."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    from safetensors.torch import save_file

    stored = {}
    for name, value in tensors.items():
        value = value.detach().cpu()
        stored[name] = (value.to(dtype) if dtype is not None and value.is_floating_point() else value).contiguous()
    save_file(stored, path, metadata={"format": "pt"})


def _load(name: str, directory: Path) -> nn.Module:
    """A component from its folder, strictly."""
    from safetensors.torch import load_file

    cls = component_class(name)
    config = cls.load_config(directory)
    state = load_file(directory / WEIGHTS_FILE)
    with torch.device("meta"):
        module = cls.from_config(config)
    module.load_state_dict(state, strict=True, assign=True)
    return module
