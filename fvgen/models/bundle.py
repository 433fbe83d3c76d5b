"""A complete model on disk and in memory: four networks, two prompt embeddings and an index.

model_index.json            kind, preset, sizes, sampling defaults
unet/ vae/ image_encoder/ image_projector/      config.json, diffusion_pytorch_model.safetensors (large ones in several files)
prompt.safetensors          prompt [77, D], empty [77, D]
text_encoder/               for other prompts, if it was kept: loaded for one only, see ``prompts.py``
SHA256SUMS                  of all files
README.md                   of a converted model: what it was made of

Or, where only the UNet differs from another model's, that difference; see ``difference.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fvgen.io.digests import verify_sums, write_sums
from fvgen.io.durable import whole_folder
from fvgen.io.outputs import parent_folders
from fvgen.utils.errors import UserError

from . import difference, prompts
from .spec import COMPONENTS, ModelIndex, ModelSpec
from .tensor_files import load_tensors, save_file, save_tensors, stored_bytes, weight_files

KIND = "fvgen"
INDEX_FILE, PROMPT_FILE, CARD_FILE = "model_index.json", "prompt.safetensors", "README.md"
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
        text_encoder: ``ClipTextTower`` of a checkpoint that is being converted; a bundle that is read has none.
    """

    index: ModelIndex
    unet: Any
    vae: Any
    image_encoder: Any
    image_projector: Any
    prompt: Tensor
    empty: Tensor
    text_encoder: Any = None

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
        directory: str | os.PathLike[str],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        verify: bool = False,
    ) -> ModelBundle:
        """Read a model directory; networks are in eval mode.

        Args:
            directory: of the model.
            device, dtype: of the weights.
            verify: compare all files with their checksums first, see :func:`verify_model`.

        Raises:
            UserError: it is no model directory, is of another kind, or a part of it is missing or does not fit.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        root = Path(directory)
        index = read_index(root)
        if verify:
            verify_model(root)
        if (root / difference.FILE).is_file():
            bundle = ModelBundle.from_pretrained(difference.base_directory(root))
            difference.add_difference(bundle.unet, root)
            bundle.index = index
            return bundle.to(device, dtype)
        missing = [part for part in model_files(root) if not (root / part).is_file()]
        if missing:
            raise UserError(f"the model directory {root} is incomplete: {', '.join(missing)} missing; save or download it again")
        parts = {}
        for name in COMPONENTS:
            try:
                parts[name] = _cast(_load(name, root / name), device, dtype).eval()
            except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
                raise UserError(f"the {name} in {root} cannot be loaded ({str(error).splitlines()[0]}); save it again") from error
        try:
            tokens = load_file(root / PROMPT_FILE)
        except SafetensorError as error:
            raise UserError(f"{root / PROMPT_FILE} cannot be loaded ({error}); save the model again") from error
        if not {"prompt", "empty"} <= set(tokens):
            raise UserError(f"{root / PROMPT_FILE} must hold the tensors prompt and empty, has {sorted(tokens)}")
        prompt, empty = (tokens[k].to(device=device, dtype=dtype) for k in ("prompt", "empty"))
        return ModelBundle(index, prompt=prompt, empty=empty, **parts)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        card: str | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Write a model directory: first beside its place, then renamed, so that it is never there in part.

        Args:
            directory: is created; an earlier model directory is replaced.
            dtype: type of the stored floating-point weights, None to keep theirs.
            card: content of its README.md; None writes none.
            progress: called with the share of the work that is done.

        Raises:
            UserError: the directory holds something else than a model, a weight is not finite in ``dtype``, or the disk is full.
        """
        root = Path(directory)
        if root.exists() and not (root / INDEX_FILE).is_file() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"{root} is not a model directory and will not be overwritten; choose another place")
        with parent_folders(root), whole_folder(root) as new:
            self._write(new, dtype, card, progress or (lambda _share: None))

    def _write(self, root: Path, dtype: torch.dtype | None, card: str | None, progress: Callable[[float], None]) -> None:
        total, done = 2 * self.stored_bytes(dtype), 0  # written, and read again for the checksums

        def written(count: int) -> None:
            nonlocal done
            done += count
            progress(min(done / total, 0.999))

        for name in self._stored():
            module = getattr(self, name)
            module.save_config(root / name)
            _forget_origin(root / name / "config.json")
            save_tensors(module.state_dict(), root / name, dtype, written)
        save_file({"prompt": self.prompt, "empty": self.empty}, root / PROMPT_FILE, dtype)
        index = {"kind": KIND, **self.index.to_dict()}
        (root / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        if card is not None:
            (root / CARD_FILE).write_text(card, encoding="utf-8")
        write_sums(root, written)

    def stored_bytes(self, dtype: torch.dtype | None = None) -> int:
        """Bytes that the weights take on the disk."""
        return sum(stored_bytes(getattr(self, name).state_dict(), dtype) for name in self._stored())

    def _stored(self) -> tuple[str, ...]:
        return COMPONENTS if self.text_encoder is None else (*COMPONENTS, prompts.FOLDER)

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
    except ValueError as error:  # no JSON, or no text at all
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


def _load(name: str, directory: Path) -> nn.Module:
    """A component from its folder, strictly."""
    cls = component_class(name)
    config = cls.load_config(directory)
    state = load_tensors(directory)
    with torch.device("meta"):
        module = cls.from_config(config)
    module.load_state_dict(state, strict=True, assign=True)
    return module


def model_files(root: Path) -> list[str]:
    """Names, relative to a model directory, of the files that make it up."""
    if (root / difference.FILE).is_file():
        return [INDEX_FILE, difference.FILE]
    names = (*COMPONENTS, prompts.FOLDER) if (root / prompts.FOLDER).is_dir() else COMPONENTS
    parts = [f"{name}/{file}" for name in names for file in ("config.json", *weight_files(root / name))]
    return [INDEX_FILE, *parts, PROMPT_FILE]


def verify_model(directory: str | os.PathLike[str]) -> dict[str, str]:
    """Compares the files of a model directory with its checksums and returns them, ``{name: SHA-256}``; of a stored difference
    those of the other model, too.

    Raises:
        UserError: it is no model directory, has no checksums, or a file differs or is missing.
    """
    root = Path(directory)
    read_index(root)
    digests = verify_sums(root, model_files(root))
    if (root / difference.FILE).is_file():
        base = difference.base_directory(root)
        digests |= {f"{base}/{name}": digest for name, digest in verify_model(base).items()}
    return digests
