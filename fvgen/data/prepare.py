"""A folder of captures to a set of shards: plan once, write the shards that are missing, then index and report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.data.clips import Clip, Rejected, choose_clips
from fvgen.data.encode import PairEncoder, preview
from fvgen.data.layouts import Capture, find_captures, locate, read_capture
from fvgen.data.pairs import Limits, build_pair
from fvgen.data.report import SHEET_ROWS, write_report
from fvgen.data.shards import INFO, PREVIEW, ShardWriter
from fvgen.io.durable import is_partial, write_durably
from fvgen.io.outputs import check_output
from fvgen.utils.errors import UserError

Bar = Callable[[Iterable[Any], str], Iterable[Any]]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Settings:
    """What determines the content of a set.

    Attributes:
        model: ``preset`` and ``sha256`` of the model that encodes.
        size: (H, W) of the clips.
        frames: T.
        compositor: how points are blended.
        max_stride: strides are 1 .. this many frames.
        clips_per_scene: at most; short scenes give fewer.
        clips_per_shard: that are tried; those rejected leave no row.
        seed: of the choice of clips.
        geometry: see :func:`fvgen.data.pairs.build_pair`.
        dtype: of stored latents and tokens: a key of ``DTYPES``.
        keep_frames: also store the pixels.
        limits: what is rejected.
    """

    model: dict[str, str]
    size: tuple[int, int]
    frames: int
    compositor: str
    max_stride: int = 4
    clips_per_scene: int = 4
    clips_per_shard: int = 32
    seed: int = 0
    geometry: str = "auto"
    dtype: str = "float16"
    keep_frames: bool = False
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Plan:
    """Which clips a set is tried to be made of; every process reads the same one from ``info.json``.

    Attributes:
        settings: see :class:`Settings`, as JSON.
        scenes: ``layout``, ``frames`` and ``missing`` (cameras without an image) by name.
        clips: in the order of the shards.
        rejected: scenes without a clip, with ``reason`` and ``detail``.
        versions: of the packages with a part in the result.
    """

    settings: dict[str, Any]
    scenes: dict[str, dict[str, Any]]
    clips: tuple[Clip, ...]
    rejected: tuple[dict[str, str], ...]
    versions: dict[str, str]

    @property
    def shards(self) -> int:
        """How many there will be."""
        return -(-len(self.clips) // self.settings["clips_per_shard"])

    def shard(self, number: int) -> tuple[Clip, ...]:
        """The clips that are tried for a shard."""
        each = self.settings["clips_per_shard"]
        return self.clips[number * each : (number + 1) * each]

    def to_json(self) -> str:
        """The content of ``info.json``."""
        clips = [[c.scene, c.number, c.first, c.stride] for c in self.clips]
        return json.dumps({**self.settings, **{k: getattr(self, k) for k in _FACTS}, "planned": clips}, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Plan:
        """Inverse of :meth:`to_json`."""
        data = json.loads(text)
        clips = tuple(Clip(*c) for c in data.pop("planned"))
        facts = {k: data.pop(k) for k in _FACTS}
        return Plan(data, facts["scenes"], clips, tuple(facts["rejected"]), facts["versions"])


_FACTS = ("scenes", "rejected", "versions")


def _no_bar(items: Iterable[Any], _what: str) -> Iterable[Any]:
    return items


def open_set(folder: Path, output: Path, settings: Settings, versions: dict[str, str], bar: Bar = _no_bar) -> Plan:
    """The plan of a set: the one that ``output`` was begun with, or a new one.

    Args:
        folder: the captures.
        output: is created if it is not there.
        settings: must be those the set was begun with.
        versions: are noted in a new plan.
        bar: shows progress.

    Raises:
        UserError: no captures, no clip that fits, other settings, a folder that holds something else.
    """
    wanted = json.loads(json.dumps(asdict(settings)))
    info = output / INFO
    if not info.is_file():
        plan = make_plan(folder, settings, versions, bar)
        _make_directory(output)
        write_durably(info, plan.to_json().encode(), keep=True)
    plan = read_plan(output)
    other = [f"{k} {plan.settings.get(k)!r}, not {v!r}" for k, v in wanted.items() if plan.settings.get(k) != v]
    if other:
        raise UserError(f"{output} was begun with {'; '.join(other)}; choose another --output or the same options")
    return plan


def _make_directory(output: Path) -> None:
    """Unless another process has begun the set meanwhile."""
    if not output.is_dir():
        check_output(output)
        output.mkdir(parents=True, exist_ok=True)
    names = [p.name for p in output.iterdir() if not is_partial(p)]
    if names and INFO not in names:
        raise UserError(f"{output} holds other files than prepared clips; choose another --output")


def read_plan(output: Path) -> Plan:
    """The plan that a set was begun with; UserError where there is none."""
    path = output / INFO
    if not path.is_file():
        raise UserError(f"{output} holds no prepared clips; begin with `fvgen prepare FOLDER --output {output}`")
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; choose another --output") from None


def make_plan(folder: Path, settings: Settings, versions: dict[str, str], bar: Bar = _no_bar) -> Plan:
    """Reads the cameras of all captures and chooses clips; arguments and errors as in :func:`open_set`."""
    scenes: dict[str, dict[str, Any]] = {}
    clips: list[Clip] = []
    rejected = []
    for found in bar(find_captures(folder), "scenes"):
        try:
            capture = read_capture(found, settings.size)
        except UserError as error:
            rejected.append({"scene": found.name, "reason": "unreadable cameras", "detail": _below(folder, str(error))})
            continue
        count = len(capture.frames)
        scenes[found.name] = {"layout": found.layout, "frames": count, "missing": capture.missing}
        if count < settings.frames:
            missing = f", {capture.missing} more have no image" if capture.missing else ""
            detail = f"{count} frames{missing}; a clip has {settings.frames}"
            rejected.append({"scene": found.name, "reason": "too few frames", "detail": detail})
        clips += choose_clips(settings.seed, found.name, count, settings.frames, settings.max_stride, settings.clips_per_scene)
    if not clips:
        told = "; ".join(f"{r['scene']}: {r['detail']}" for r in rejected[:3])
        raise UserError(f"no scene in {folder} gives a clip ({told}); use longer captures or fewer --frames")
    return Plan(json.loads(json.dumps(asdict(settings))), scenes, tuple(clips), tuple(rejected), versions)


def write_part(
    folder: Path, output: Path, plan: Plan, encoder: PairEncoder, part: tuple[int, int] = (0, 1), bar: Bar = _no_bar
) -> Counter[str]:
    """Writes every ``n``-th shard, except those that are there.

    Args:
        folder: the captures.
        output: the set.
        plan: from :func:`open_set`.
        encoder: with the model of the plan.
        part: (i, n) with i in 0 .. n - 1.
        bar: shows progress; is given the clips.

    Returns:
        how many clips were written (``"written"``) and rejected, by reason.

    Raises:
        UserError: a capture has changed since the set was begun, or the disk is full.
    """
    writer = ShardWriter(output, plan.shards)
    writer.write_constants(encoder.constants(tuple(plan.settings["size"])))
    captures = _reader(folder, plan)
    todo = [number for number in range(part[0], plan.shards, part[1]) if not writer.done(number)]
    work = [(number, clip) for number in todo for clip in plan.shard(number)]
    ends = {number: plan.shard(number)[-1] for number in todo}
    counts: Counter[str] = Counter()
    shown = -(-SHEET_ROWS // plan.shards)
    shard = _Shard(shown)
    for number, clip in bar(work, "clips"):
        try:
            shard.add(clip, *_make(captures(clip.scene), clip, plan, encoder))
            counts["written"] += 1
        except Rejected as error:
            shard.reject(clip, error.reason, _below(folder, error.detail))
            counts[error.reason] += 1
        if clip is ends[number]:
            writer.write(number, shard.clips, shard.record(), shard.previews())
            shard = _Shard(shown)
    return counts


class _Shard:
    """A shard in work; of the first clips of up to ``shown`` scenes it keeps a preview."""

    def __init__(self, shown: int) -> None:
        self.clips: list[dict[str, Tensor]] = []
        self.kept: list[dict[str, Any]] = []
        self.rejected: list[dict[str, Any]] = []
        self._room, self._shown = shown, dict[str, tuple[int, Tensor]]()

    def record(self) -> dict[str, Any]:
        return {"clips": self.kept, "rejected": self.rejected, PREVIEW: [row for row, _ in self._shown.values()]}

    def previews(self) -> dict[str, Tensor]:
        return {PREVIEW: torch.stack([picture for _, picture in self._shown.values()])} if self._shown else {}

    def add(self, clip: Clip, tensors: dict[str, Tensor], facts: dict[str, Any], picture: Tensor) -> None:
        if len(self._shown) < self._room:
            self._shown.setdefault(clip.scene, (len(self.clips), picture))
        self.clips.append(tensors)
        self.kept.append({**asdict(clip), **facts})

    def reject(self, clip: Clip, reason: str, detail: str) -> None:
        self.rejected.append({**asdict(clip), "reason": reason, "detail": detail})


def _make(capture: Capture, clip: Clip, plan: Plan, encoder: PairEncoder) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """Tensors, facts and preview of a clip; Rejected where it cannot be used."""
    s = plan.settings
    pair = build_pair(
        capture, clip, s["frames"], tuple(s["size"]), s["compositor"], s["geometry"], Limits(**s["limits"]), encoder.device
    )
    return encoder(pair), pair.facts, preview(pair.truth, pair.renders)


def _reader(folder: Path, plan: Plan) -> Callable[[str], Capture]:
    @lru_cache(maxsize=2)
    def read(scene: str) -> Capture:
        known = plan.scenes[scene]
        found = locate(folder, scene, known["layout"])
        capture = read_capture(found, tuple(plan.settings["size"]))
        if len(capture.frames) != known["frames"]:
            raise UserError(
                f"{found.path} had {known['frames']} frames when the set was begun and has {len(capture.frames)} now; "
                "restore it or choose another --output"
            )
        return capture

    return read


def finish_set(output: Path, plan: Plan, bar: Bar = _no_bar) -> dict[str, Any]:
    """Writes report, contact sheet and, at the end, the index of a set whose shards are all there; returns the report.

    Raises:
        UserError: shards are missing, or not one clip was kept.
    """
    writer = ShardWriter(output, plan.shards)
    missing = writer.missing()
    if missing:
        writer.finish()  # says which
    records = [record for number in range(plan.shards) if (record := writer.record(number))]
    report = write_report(output, plan, records)
    if not report["clips"]["written"]:
        raise UserError(f"all {len(plan.clips)} clips were rejected; {output / 'report.md'} says why")
    writer.finish(bar(range(plan.shards), "checksums"))
    return report


def _below(folder: Path, text: str) -> str:
    """One line without the place of the folder, so that a set does not depend on it."""
    return " ".join(text.replace(f"{folder}/", "").split())
