"""Networks with the golden weights."""

from __future__ import annotations

from torch import nn

from fvgen.models.image_projector import ImageProjector
from fvgen.models.key_map import image_projector_key_map, unet_key_map, vae_key_map
from fvgen.models.reference_config import image_projector_arguments, unet_arguments, vae_arguments
from fvgen.models.unet import VideoUNet
from fvgen.models.vae import make_vae

from . import reference


def tiny_unet() -> VideoUNet:
    unet = VideoUNet(**unet_arguments(reference.manifest("unet_tiny")["config"]))
    reference.load(unet, unet_key_map(unet), reference.tensors("unet_tiny", "weights."))
    return unet


def tiny_vae() -> nn.Module:
    vae = make_vae(**vae_arguments(reference.manifest("vae_tiny")["ddconfig"]))
    return reference.load(vae, vae_key_map(vae), reference.tensors("vae_tiny", "weights."))


def image_projector(file: str, prefix: str, config: str) -> nn.Module:
    projector = ImageProjector(**image_projector_arguments(reference.manifest(file)[config]))
    return reference.load(projector, image_projector_key_map(projector), reference.tensors(file, prefix))
