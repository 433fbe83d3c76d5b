"""Point clouds to images."""

from fvgen.render.known import put_photos
from fvgen.render.points import render_points, render_scene

__all__ = ["put_photos", "render_points", "render_scene"]
