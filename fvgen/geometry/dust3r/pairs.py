"""Which pairs of photos DUSt3R sees, and what it says about each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fvgen.models.dust3r import Dust3rNetwork

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class PairPrediction:
    """Point maps of two photos in the camera frame of the first (OpenCV axes, each pair with a unit of its own).

    Attributes:
        first, second: indices of the photos.
        points_first: ``[H, W, 3]`` float32; ``confidence_first`` ``[H, W]`` above 1.
        points_second, confidence_second: the same of the second photo, still in the frame of the first.
    """

    first: int
    second: int
    points_first: Tensor
    confidence_first: Tensor
    points_second: Tensor
    confidence_second: Tensor

    @property
    def score(self) -> float:
        """Product of both mean confidences; the pair with the highest score is trusted most."""
        return float(self.confidence_first.mean() * self.confidence_second.mean())


def complete_pairs(count: int) -> list[tuple[int, int]]:
    """Every ordered pair of ``count`` photos: (1, 0), (2, 0), (2, 1), ... and then the same pairs swapped."""
    pairs = [(i, j) for i in range(count) for j in range(i)]
    return pairs + [(j, i) for i, j in pairs]


@torch.no_grad()
def predict_pairs(
    network: Dust3rNetwork, images: Sequence[Tensor], pairs: Sequence[tuple[int, int]], *, progress: Progress | None = None
) -> list[PairPrediction]:
    """Predictions for ``pairs`` in their order, on the CPU. Each image is encoded once.

    Args:
        network: on any device.
        images: ``[1, 3, H, W]`` each, in [-1, 1]; sizes and orientations may differ.
        pairs: (first, second) indices into ``images``.
        progress: called with a label and the fraction that is done.
    """
    used = sorted({index for pair in pairs for index in pair})
    steps, done = len(used) + len(pairs), 0
    features = {}
    for index in used:
        features[index] = network.encode(images[index].to(network.device, network.dtype))
        done += 1
        if progress:
            progress("encoding photos", done / steps)
    predictions = []
    for first, second in pairs:
        maps = network.decode(features[first], features[second])
        parts = [part[0].cpu() for point_map in maps for part in (point_map.points, point_map.confidence)]
        predictions.append(PairPrediction(first, second, *parts))
        done += 1
        if progress:
            progress("predicting pairs", done / steps)
    return predictions


def image_confidence(predictions: Sequence[PairPrediction], index: int) -> Tensor:
    """Confidence ``[H, W]`` of a photo: the highest that any pair with it gives."""
    found = [p.confidence_first for p in predictions if p.first == index]
    found += [p.confidence_second for p in predictions if p.second == index]
    return torch.stack(found).amax(0)
