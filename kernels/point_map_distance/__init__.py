"""Loss and gradients of DUSt3R's global alignment in one pass over the point maps. Derivation: README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from fvgen.kernels.point_map_distance.spec import point_map_distance_op


def point_map_distance(depths: Tensor, rays: Tensor, cameras: Tensor, motions: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Sum of ``w |C (z x, z y, z) + c - (A p + b)|`` over photos, maps and pixels.

    Args:
        depths: ``[V, P]`` z of the P pixels of V photos in their own frames; float32 (float64 on the slower path).
        rays: ``[2, P]`` x and y of the pixels at z = 1, the same for all photos.
        cameras: ``[V, 3, 4]`` (C | c) from a photo's frame to the world; C may hold the focal length, too.
        motions: ``[V, M, 3, 4]`` (A | b) from the frame of each of the M maps of a photo to the world.
        points: ``[V, M, 3, P]`` the maps' points p; weights: ``[V, M, P]``, zero where a photo has fewer maps.

    Returns:
        Scalar in units of the world, differentiable in depths, cameras and motions (once). Where a distance is zero its gradient
        is zero. Sums are in the same order every time, so that results repeat.

    Source: global alignment of DUSt3R (arXiv 2312.14132, section 3.4).

    Raises:
        RuntimeError: shapes that do not fit together.
    """
    points, weights = points.detach().contiguous(), weights.detach().contiguous()
    small = depths.contiguous(), rays.detach().contiguous(), cameras.contiguous(), motions.contiguous()
    return point_map_distance_op(*small, points, weights)[0]
