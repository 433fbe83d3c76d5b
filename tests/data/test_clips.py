"""The choice of clips."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from fvgen.data.clips import choose_clips

numbers = st.integers(0, 2**63 - 1)


@given(numbers, st.text(max_size=20), st.integers(0, 120), st.integers(2, 25), st.integers(1, 6), st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_properties(seed: int, scene: str, available: int, frames: int, max_stride: int, count: int) -> None:
    clips = choose_clips(seed, scene, available, frames, max_stride, count)
    possible = sum(max(0, available - (frames - 1) * s) for s in range(1, max_stride + 1))
    assert len(clips) == min(count, possible)
    assert len({(c.first, c.stride) for c in clips}) == len(clips)
    assert [c.number for c in clips] == list(range(len(clips)))
    for clip in clips:
        shown = clip.frames(frames)
        assert len(shown) == frames
        assert 1 <= clip.stride <= max_stride
        assert 0 <= shown[0] < shown[-1] < available
        assert {b - a for a, b in pairwise(shown)} == {clip.stride}
    assert choose_clips(seed, scene, available, frames, max_stride, count + 3)[: len(clips)] == clips


def test_every_clip_is_drawn_in_the_end() -> None:
    clips = choose_clips(1, "s", 20, 5, 4, 10**6)
    assert {(c.first, c.stride) for c in clips} == {(f, s) for s in range(1, 5) for f in range(20 - 4 * s)}


def test_strides_and_starts_are_uniform() -> None:
    """The first clip of 4000 scenes: counts within four standard deviations of a fair draw."""
    drawn = [choose_clips(5, f"scene {i}", 60, 16, 4, 1)[0] for i in range(4000)]
    strides = Counter(c.stride for c in drawn)
    assert set(strides) == {1, 2, 3}  # 16 frames of stride 4 take 61
    assert all(abs(n - 4000 / 3) < 4 * (4000 * (1 / 3) * (2 / 3)) ** 0.5 for n in strides.values())
    starts = Counter(c.first for c in drawn if c.stride == 3)
    each = strides[3] / 15
    assert set(starts) == set(range(15))
    assert all(abs(n - each) < 4 * each**0.5 for n in starts.values())


def test_another_seed_or_scene_gives_other_clips() -> None:
    chosen = {(s, n): tuple((c.first, c.stride) for c in choose_clips(s, n, 200, 16, 4, 8)) for s in (0, 1) for n in ("a", "b")}
    assert len(set(chosen.values())) == 4


def test_other_processes_choose_the_same() -> None:
    """Python's own hash of a text differs between processes; this must not."""
    code = "from fvgen.data.clips import choose_clips as c; print([(x.first, x.stride) for x in c(3, 'a/b', 90, 16, 4, 5)])"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([(x.first, x.stride) for x in choose_clips(3, "a/b", 90, 16, 4, 5)])
