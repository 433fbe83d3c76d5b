"""What tells models apart whose latents and tokens do not mean the same."""

from __future__ import annotations

import hashlib
import json

import torch

from fvgen.models.bundle import ModelBundle


def encoder_digest(bundle: ModelBundle) -> str:
    """SHA-256 of all that turns frames into latents and conditions: VAE, image branch, prompts, frame rate; not of the UNet.

    Of the values as float32, wherever they are and in whichever order they were stored.
    """
    found = hashlib.sha256(json.dumps([float(bundle.vae.config.scaling_factor), bundle.index.fps]).encode())
    parts = {name: getattr(bundle, name).state_dict() for name in ("vae", "image_encoder", "image_projector")}
    parts["prompts"] = {"prompt": bundle.prompt, "empty": bundle.empty}
    for part, tensors in parts.items():
        for name in sorted(tensors):
            x = tensors[name].detach().to("cpu", torch.float32).contiguous()
            found.update(f"{part} {name} {list(x.shape)}".encode())
            found.update(x.numpy().reshape(-1).view("uint8"))
    return found.hexdigest()
