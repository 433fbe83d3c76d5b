"""What a complete model consists of: sizes, sampling defaults and the constructor arguments of each network."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fvgen.utils.errors import UserError

_KINDS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float), "bool": bool}
COMPONENTS = ("unet", "vae", "image_encoder", "image_projector")


@dataclass(frozen=True)
class ModelIndex:
    """The content of ``model_index.json``.

    Attributes:
        preset: name of the recipe the networks were built from.
        height, width: image size in pixels, landscape.
        frames: frames per clip.
        latent_channels: channels of the VAE latent; the UNet takes twice as many.
        base_scale: s_t of the schedule at late times.
        sampler: ``few_step`` for a distilled student, ``ddim`` for a teacher.
        steps, guidance_scale, guidance_rescale, eta: sampling defaults.
        fps: frame rate handed to the network.
        portrait: whether the network was also trained with height and width exchanged.
        compositor: how the renders it was trained on were blended, "alpha" or "norm".
    """

    preset: str
    height: int
    width: int
    frames: int
    latent_channels: int = 4
    base_scale: float = 0.7
    sampler: str = "few_step"
    steps: int = 4
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    eta: float = 1.0
    fps: int = 10
    portrait: bool = False
    compositor: str = "alpha"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelIndex:
        """Raises UserError when a required field is missing or of another type; unknown fields are ignored."""
        known = {f.name for f in fields(ModelIndex)}
        missing = [name for name in ("preset", "height", "width", "frames") if name not in values]
        if missing:
            raise UserError(f"model_index.json lacks {', '.join(missing)}; save the model again")
        for kind in fields(ModelIndex):
            if kind.name in values and not isinstance(values[kind.name], _KINDS[str(kind.type)]):
                raise UserError(f"model_index.json has {values[kind.name]!r} for {kind.name}; save the model again")
        return ModelIndex(**{k: v for k, v in values.items() if k in known})

    def sizes(self) -> list[tuple[int, int]]:
        """The (height, width) pairs in pixels that the model accepts."""
        both = [(self.height, self.width)]
        return [*both, (self.width, self.height)] if self.portrait and self.height != self.width else both


@dataclass(frozen=True)
class ModelSpec:
    """An index and the constructor arguments of every network.

    Attributes:
        index: sizes and sampling defaults.
        unet, vae, image_encoder, image_projector: arguments of ``VideoUNet``, ``make_vae``, ``ClipVisionTower`` and
            ``ImageProjector``.
        text_encoder: arguments of ``ClipTextTower``, which is needed only to make the stored prompt embeddings.
    """

    index: ModelIndex
    unet: dict[str, Any] = field(default_factory=dict)
    vae: dict[str, Any] = field(default_factory=dict)
    image_encoder: dict[str, Any] = field(default_factory=dict)
    image_projector: dict[str, Any] = field(default_factory=dict)
    text_encoder: dict[str, Any] = field(default_factory=dict)

    @property
    def context_dim(self) -> int:
        return int(self.unet.get("context_dim", 1024))
