"""Which method makes a scene of photos: the classical one, or DUSt3R where its weights are given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fvgen.geometry import estimate_scene
from fvgen.types import Cameras, ImageSet, Scene
from fvgen.utils.device import lent
from fvgen.utils.errors import UserError
from fvgen.utils.stopwatch import Progress

if TYPE_CHECKING:
    from fvgen.models.dust3r import Dust3rNetwork

GEOMETRIES = ("auto", "classical", "dust3r")


class Estimator(Protocol):
    """Makes a scene of photos.

    Attributes:
        fewest: photos it needs.
        mixed: whether photos may differ in size while their cameras are estimated; without it they may not.
    """

    fewest: int

    def __call__(self, images: ImageSet, cameras: Cameras | None = None, *, progress: Progress | None = None) -> Scene:
        """The scene of photos with known cameras, or of photos alone; see :func:`fvgen.geometry.estimate_scene`."""


class ClassicalEstimator:
    """Features, bundle adjustment and stereo: :func:`fvgen.geometry.estimate_scene`."""

    fewest, mixed = 2, False

    def __call__(self, images: ImageSet, cameras: Cameras | None = None, *, progress: Progress | None = None) -> Scene:
        return estimate_scene(images, cameras, progress=progress)


class Dust3rEstimator:
    """DUSt3R: :func:`fvgen.geometry.dust3r.estimate.dust3r_scene`.

    Args:
        network: the network, or a directory written by ``fvgen convert dust3r``.
        device: where it runs.
        dtype: of encoder and decoders. In float32 a GPU multiplies in TF32, as the original does; bfloat16 takes half the memory.
        min_confidence: pixels at or below it get no point.
        offload: keep the weights on the CPU but for the moment of each call.
        verify: compare the directory's files with their checksums first.

    Raises:
        UserError: the directory holds no network, or a damaged one.
    """

    fewest, mixed = 1, True

    def __init__(
        self,
        network: Dust3rNetwork | str | os.PathLike[str],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        min_confidence: float | None = None,
        offload: bool = False,
        verify: bool = False,
    ) -> None:
        from fvgen.models.dust3r import read_dust3r

        found = read_dust3r(network, verify) if isinstance(network, str | os.PathLike) else network
        self.network = found.to("cpu" if offload else device).trunk_to(dtype).eval()
        self._device = device
        self._options: dict[str, Any] = {} if min_confidence is None else {"min_confidence": min_confidence}

    def __call__(self, images: ImageSet, cameras: Cameras | None = None, *, progress: Progress | None = None) -> Scene:
        from fvgen.geometry.dust3r.estimate import dust3r_scene

        with lent(self.network, self._device):
            return dust3r_scene(self.network, images, cameras, progress=progress, **self._options)


def wants_dust3r(geometry: str, weights: str | os.PathLike[str] | None) -> bool:
    """Whether a choice of ``GEOMETRIES`` means DUSt3R; "auto" does where weights are given.

    Raises:
        UserError: an unknown choice, or weights and choice contradict each other.
    """
    if geometry not in GEOMETRIES:
        raise UserError(f"unknown geometry {geometry!r}; use {', '.join(GEOMETRIES)}")
    if geometry == "dust3r" and weights is None:
        raise UserError("the geometry dust3r needs weights: give --dust3r-weights a directory written by `fvgen convert dust3r`")
    if geometry == "classical" and weights is not None:
        raise UserError("the geometry classical takes no DUSt3R weights; leave them out or use dust3r")
    if weights is not None and not Path(weights).exists():
        raise UserError(f"there are no DUSt3R weights {weights}; make them with `fvgen convert dust3r`")
    return weights is not None


def make_estimator(
    geometry: str = "auto",
    weights: str | os.PathLike[str] | None = None,
    device: str | torch.device = "cpu",
    offload: bool = False,
    min_confidence: float | None = None,
    verify: bool = False,
) -> Estimator:
    """The estimator of a choice of ``GEOMETRIES``.

    Args:
        geometry: "classical", "dust3r", or "auto": DUSt3R where weights are given.
        weights: directory written by ``fvgen convert dust3r``.
        device: where DUSt3R runs.
        offload: its weights are there only while it does.
        min_confidence: pixels at or below it get no point; None = log 3, of values above 1.
        verify: compare the directory's files with their checksums first.

    Raises:
        UserError: see :func:`wants_dust3r`, or the weights cannot be read.
    """
    if wants_dust3r(geometry, weights):
        assert weights is not None
        return Dust3rEstimator(weights, device, min_confidence=min_confidence, offload=offload, verify=verify)
    return ClassicalEstimator()
