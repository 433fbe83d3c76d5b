"""Photos to cameras and point maps, and paths of cameras."""

from fvgen.geometry.estimate import estimate_scene

__all__ = ["estimate_scene"]
