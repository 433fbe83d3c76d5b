"""Pairs to what a trainer reads: latents, tokens and cameras."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.codec import Conditioner, LatentCodec
from fvgen.data.clips import Rejected
from fvgen.data.pairs import Pair
from fvgen.models.bundle import ModelBundle
from fvgen.types import RenderClip

PREVIEW_FRAMES = (1 / 3, 2 / 3)  # of the clip's length


class PairEncoder:
    """Encodes with a model's VAE and image towers as :class:`fvgen.sampling.ModelSampler` does: the posterior's mode.

    Args:
        bundle: the model, on the device that is to do the work.
        dtype: of latents and tokens as they are stored.
        keep_frames: also keep the pixels.
    """

    def __init__(self, bundle: ModelBundle, dtype: torch.dtype = torch.float16, keep_frames: bool = False) -> None:
        self.device = next(bundle.vae.parameters()).device
        self._bundle, self._dtype, self._keep = bundle, dtype, keep_frames
        self._codec = LatentCodec(bundle.vae)
        towers = bundle.image_encoder, bundle.image_projector
        self._conditioner = Conditioner(self._codec, *towers, bundle.prompt, bundle.empty, bundle.index.fps)

    def __call__(self, pair: Pair) -> dict[str, Tensor]:
        """Tensors of one clip, on the CPU.

        Returns:
            ``clean``, ``render`` ``[C, T, h, w]`` scaled latents of the photos and of the renders; ``image_tokens [N, D]``;
            ``fps`` int64 scalar; ``world_from_cam [T, 4, 4]`` and ``K [T, 3, 3]`` float32 of the clip's frames; with
            ``keep_frames`` also ``clean_rgb`` and ``render_rgb`` ``[T, 3, H, W]`` uint8 and ``coverage [T, H, W]`` bool.

        Raises:
            Rejected: the latents do not fit the stored type.
        """
        truth, renders = pair.truth.to(self.device), pair.renders.rgb.to(self.device)
        condition = self._conditioner(renders)
        encoded = {
            "clean": self._codec.encode(truth)[0],
            "render": condition.latents[0],
            "image_tokens": condition.context[0, len(self._bundle.prompt) :],
        }
        clip = {name: x.to("cpu", self._dtype).contiguous() for name, x in encoded.items()}
        for name, x in clip.items():
            if not bool(x.isfinite().all()):
                raise Rejected("not finite", f"{name} has values beyond {self._dtype}")
        cameras = pair.renders.cameras
        clip |= {"fps": condition.fps[0].cpu(), "world_from_cam": cameras.world_from_cam.float(), "K": cameras.K.float()}
        if self._keep:
            pixels = {"clean_rgb": to_bytes(pair.truth), "render_rgb": to_bytes(pair.renders.rgb)}
            clip |= {**pixels, "coverage": pair.renders.coverage}
        return clip

    def constants(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """What all clips of ``size`` (H, W) share, float32.

        Returns:
            ``text_tokens [77, D]`` of the fixed prompt; ``uncond_context [77 + N, D]`` of the empty prompt and a grey image.
        """
        grey = torch.zeros(1, 3, *size, device=self.device)
        with torch.no_grad():
            uncond = self._conditioner.context(self._bundle.empty, grey)[0]
        found = {"text_tokens": self._bundle.prompt, "uncond_context": uncond}
        return {name: x.detach().float().cpu().contiguous() for name, x in found.items()}


def preview(truth: Tensor, renders: RenderClip) -> Tensor:
    """``[1 + 2 N, 3, H, W]`` uint8: the first photo, then render and photo of each of ``PREVIEW_FRAMES``."""
    at = [round(share * (len(truth) - 1)) for share in PREVIEW_FRAMES]
    return to_bytes(torch.stack([truth[0], *(frames[t] for t in at for frames in (renders.rgb, truth))]))


def to_bytes(rgb: Tensor) -> Tensor:
    """[0, 1] to uint8, rounded."""
    return (rgb.clamp(0, 1) * 255 + 0.5).byte()
