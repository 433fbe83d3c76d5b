"""Which pairs of photos DUSt3R sees, and what it says about each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fvgen.models.dust3r import Dust3rNetwork

Progress = Callable[[str, float], None]
GPU_BATCH = 8


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

    @cached_property
    def score(self) -> float:
        """Product of both mean confidences; the pair with the highest score is trusted most."""
        return float(self.confidence_first.mean() * self.confidence_second.mean())

    def to(self, device: torch.device | str) -> PairPrediction:
        """The same on another device."""
        names = ("points_first", "confidence_first", "points_second", "confidence_second")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def complete_pairs(count: int) -> list[tuple[int, int]]:
    """Every ordered pair of ``count`` photos: (1, 0), (2, 0), (2, 1), ... and then the same pairs swapped."""
    pairs = [(i, j) for i in range(count) for j in range(i)]
    return pairs + [(j, i) for i, j in pairs]


def neighbour_pairs(count: int) -> list[tuple[int, int]]:
    """Both orders of every two successive photos; the photo with itself where there is one only."""
    pairs = [(i, i + 1) for i in range(count - 1)]
    return pairs + [(j, i) for i, j in pairs] or [(0, 0)]


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """How a GPU makes float32 matrix products inside the block, whatever the caller has chosen.

    Args:
        precision: "highest", or "high": their inputs may be rounded to TF32, as in the original everywhere.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@float32_products("high")
def predict_pairs(
    network: Dust3rNetwork,
    images: Sequence[Tensor],
    pairs: Sequence[tuple[int, int]],
    *,
    batch: int | None = None,
    progress: Progress | None = None,
) -> list[PairPrediction]:
    """Predictions for ``pairs`` in their order, on the network's device. Each image is encoded once.

    Args:
        network: on any device.
        images: ``[1, 3, H, W]`` each, in [-1, 1]; sizes and orientations may differ.
        pairs: (first, second) indices into ``images``.
        batch: images or pairs at once, where they agree in size; None = 8 on a GPU and 1 elsewhere.
        progress: called with a label and the fraction that is done.
    """
    device = network.device
    batch = batch or (GPU_BATCH if device.type == "cuda" else 1)
    used = sorted({index for pair in pairs for index in pair})
    steps, done = len(used) + len(pairs), 0
    features: dict[int, Any] = {}
    for part in _alike(used, lambda index: images[index].shape, batch):
        encoded = network.encode(torch.cat([images[index] for index in part]).to(device))
        features |= {index: encoded[n : n + 1] if len(part) > 1 else encoded for n, index in enumerate(part)}
        done += len(part)
        if progress:
            progress("encoding photos", done / steps)
    found: dict[tuple[int, int], PairPrediction] = {}
    for some in _alike(pairs, lambda pair: (images[pair[0]].shape, images[pair[1]].shape), batch):
        sides = [[features[pair[side]] for pair in some] for side in (0, 1)]
        maps = network.decode(*(side[0].join(side) if len(side) > 1 else side[0] for side in sides))
        for n, pair in enumerate(some):
            parts = [part[n] for point_map in maps for part in (point_map.points, point_map.confidence)]
            found[pair] = PairPrediction(*pair, *parts)
        done += len(some)
        if progress:
            progress("predicting pairs", done / steps)
    return [found[pair] for pair in pairs]


def _alike(items: Iterable[Any], kind: Callable[[Any], Any], most: int) -> Iterator[list[Any]]:
    """Up to ``most`` items of one kind at a time."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    for group in groups.values():
        yield from (group[n : n + most] for n in range(0, len(group), most))


def image_confidence(predictions: Sequence[PairPrediction], index: int) -> Tensor:
    """Confidence ``[H, W]`` of a photo: the highest that any pair with it gives."""
    found = [p.confidence_first for p in predictions if p.first == index]
    found += [p.confidence_second for p in predictions if p.second == index]
    return torch.stack(found).amax(0)
