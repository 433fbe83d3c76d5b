"""Types of command-line arguments: text to value, with a sentence where it does not fit."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

MAX_SIDE = 4096


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argument type: whole numbers from ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return value

    return parse


def positive(high: float) -> Callable[[str], float]:
    """An argument type: numbers above 0 and up to ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= high:
            raise argparse.ArgumentTypeError(f"must be a number above 0 and up to {high:g}, not {text!r}")
        return value

    return parse


def between(low: float, high: float) -> Callable[[str], float]:
    """An argument type: numbers from ``low`` to ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, not {text!r}")
        return value

    return parse


def part(text: str) -> tuple[int, int]:
    """``I/N`` with I from 1 to N, to (I - 1, N)."""
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, for example 3/8, not {text!r}")
    return int(first) - 1, int(of)


def size(text: str) -> tuple[int, int]:
    """``WxH`` to (H, W)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and all(16 <= int(v) <= MAX_SIDE for v in (width, height))):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT with 16 to {MAX_SIDE} pixels a side, not {text!r}")
    return int(height), int(width)
