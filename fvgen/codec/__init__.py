"""Pixels to latents and conditions, and back."""

from .conditioning import Conditioner
from .latents import LatentCodec, posterior

__all__ = ["Conditioner", "LatentCodec", "posterior"]
