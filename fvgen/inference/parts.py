"""The engine's parts in the places of the ordinary modules, for samplers that run step by step."""

from __future__ import annotations

from torch import Tensor

from fvgen.codec import LatentCodec
from fvgen.diffusion.predict import PredictV
from fvgen.inference.unet import Keys, UNetEngine
from fvgen.inference.vae import PackedVAE
from fvgen.types import Condition


class EngineCodec(LatentCodec):
    """A :class:`LatentCodec` whose frames go through the packed VAE.

    Args:
        vae: the original, for its configuration.
        packed: what runs.
    """

    def __init__(self, vae: object, packed: PackedVAE) -> None:
        super().__init__(vae, chunk=1 << 30)  # the packed VAE divides the frames itself
        self._packed = packed

    def _moments(self, pixels: Tensor) -> Tensor:
        return self._packed.encode(pixels)

    def _pixels(self, latents: Tensor) -> Tensor:
        return self._packed.decode(latents)


def engine_predictor(unet: UNetEngine) -> PredictV:
    """``predict_v`` of a packed network. The keys of the last two contexts are kept: guidance takes turns with two."""
    kept: list[tuple[Tensor, Keys]] = []

    def predict_v(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        frames = x.shape[2]
        found = [keys for context, keys in kept if context is condition.context]
        if not found:
            found = [unet.keys(condition.context, frames)]
            kept.append((condition.context, found[0]))
            del kept[:-2]
        return unet(unet.stack(x, condition.latents), unet.shifts(t, condition.fps, frames), found[0])

    return predict_v
