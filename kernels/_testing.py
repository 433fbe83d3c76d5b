"""Helpers for tests of operators: poisoned memory and comparisons that say what differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


def _poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        out = make(*args, **kwargs)
        if out.device.type == "meta" or type(out) is not Tensor:
            return out
        if out.is_floating_point():
            return out.fill_(float("nan"))
        if out.dtype == torch.bool:
            return out.fill_(True)
        return out.fill_(0xFF if out.dtype == torch.uint8 else torch.iinfo(out.dtype).min + 1)

    return poisoned


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills what ``torch.empty`` and its relatives return with NaN or absurd numbers, so that an unwritten output shows.

    The functions are replaced, because a torch function mode is switched off inside operators.
    """
    with (
        patch.object(torch, "empty", _poison(torch.empty)),
        patch.object(torch, "empty_like", _poison(torch.empty_like)),
        patch.object(Tensor, "new_empty", _poison(Tensor.new_empty)),
    ):
        yield


def as_tuple(out: Any) -> tuple:
    return tuple(out) if isinstance(out, (tuple, list)) else (out,)


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest entry of ``expected``; NaN where either is NaN, 0 for empty tensors."""
    if expected.numel() == 0:
        return 0.0
    scale = expected.detach().double().abs().max().clamp(min=1e-30)
    return ((actual.detach().double().to(expected.device) - expected.detach().double()).abs().max() / scale).item()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Same shape and dtype, and :func:`largest_error` at most ``tolerance`` (0: equal bit for bit, integers always)."""
    assert actual.shape == expected.shape, f"{name}: shape {list(actual.shape)} instead of {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype} instead of {expected.dtype}"
    actual = actual.to(expected.device)
    if tolerance == 0 or not expected.is_floating_point():
        wrong = int((actual != expected).sum())
        assert wrong == 0, f"{name}: {wrong} of {expected.numel()} entries differ"
        return
    error = largest_error(actual, expected)
    assert error <= tolerance, f"{name}: largest error {error:.2e} of the largest entry, allowed {tolerance:.0e}"


def assert_close_outside_band(
    actual: Tensor,
    expected: Tensor,
    band: Tensor,
    *,
    tolerance: float,
    largest_share: float,
    name: str,
) -> None:
    """For outputs with discontinuities: tight where ``band`` (bool, broadcastable) is False, and the band itself must be small.

    Args:
        band: entries near a discontinuity, where a rounding may decide; at most ``largest_share`` of all.
    """
    band = band.expand(expected.shape)
    share = band.double().mean().item() if band.numel() else 0.0
    assert share <= largest_share, f"{name}: {share:.2%} of the entries lie near a discontinuity, allowed {largest_share:.2%}"
    error = largest_error(actual.masked_fill(band, 0.0), expected.masked_fill(band, 0.0))
    assert error <= tolerance, f"{name}: largest error {error:.2e} away from discontinuities, allowed {tolerance:.0e}"
