"""Files in and out."""

from fvgen.io.cameras import read_cameras, write_transforms
from fvgen.io.images import read_images
from fvgen.io.ply import write_ply

__all__ = ["read_cameras", "read_images", "write_ply", "write_transforms"]
