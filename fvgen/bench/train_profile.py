"""Where the GPU's time goes in the updates of a trainer: by group of kernels, and by kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

from fvgen.bench.timing import synchronize

_OWN = "fvgen: "
# the first pattern that is found in a kernel's name decides; own Triton kernels end in _kernel
GROUPS: tuple[tuple[str, str], ...] = (
    ("communication", r"nccl"),
    (_OWN + "temporal attention", r"^temporal_attention"),
    (_OWN + "cross-attention", r"^(cross_attention|query_gradient|context_gradient)_kernel"),
    (_OWN + "temporal convolution", r"^(descriptor|pointer)_kernel"),
    (_OWN + "group norm and SiLU", r"^(statistics|combine|normalise|small|sums|combine_backward|gradient)_kernel"),
    (_OWN + "layer norm and residual", r"^layer_norm(_backward)?_kernel"),
    (_OWN + "GEGLU", r"^geglu(_backward)?_kernel"),
    (_OWN + "noise, score weighting", r"^(noise_injection|noise_injection_backward|distance|guidance_spread)_kernel"),
    ("optimiser, clipping, average", r"multi_tensor_apply|[Aa]dam|lpnorm|LpNorm|_foreach"),
    ("attention over pixels", r"flash|fmha|sdpa|scaled_dot_product"),
    ("convolutions", r"conv|cudnn|fprop|dgrad|wgrad"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|gemv|splitK|aten::(mm|addmm|bmm|linear)"),
    ("norms of PyTorch", r"[Nn]orm"),
    ("copies and casts", r"[Cc]opy|[Mm]emcpy|[Mm]emset|[Ff]ill|CatArray|aten::(cat|stack|zero_|_to_copy)"),
    ("elementwise, sums", r"elementwise|reduce|aten::"),
)
OTHER = "other"
_WAITS = (" Sync", " Wait Event")  # some profilers list waiting beside the kernels


@dataclass(frozen=True)
class Profile:
    """Of a few updates.

    Attributes:
        span_ms: from the first kernel to the end of the last; None without a GPU, like ``busy_ms``.
        busy_ms: how long at least one kernel ran.
        kernels: name -> milliseconds and calls; without a GPU, operators and the processor's time.
    """

    span_ms: float | None
    busy_ms: float | None
    kernels: dict[str, tuple[float, int]]

    @property
    def busy_percent(self) -> float | None:
        """Share of the span in which the GPU computes; the rest it waits for the host."""
        return None if not self.span_ms or self.busy_ms is None else 100 * self.busy_ms / self.span_ms

    def groups(self) -> dict[str, float]:
        """Group -> percent of the kernels' time, largest first."""
        sums: dict[str, float] = {}
        for name, (ms, _) in self.kernels.items():
            sums[group_of(name)] = sums.get(group_of(name), 0.0) + ms
        total = sum(sums.values()) or 1.0
        return {name: 100 * ms / total for name, ms in sorted(sums.items(), key=lambda item: -item[1])}


def group_of(kernel: str) -> str:
    """The group of a kernel's name."""
    return next((group for group, pattern in GROUPS if re.search(pattern, kernel)), OTHER)


def profile_updates(update: Callable[[], None], count: int, device: torch.device) -> Profile:
    """What so many calls of ``update`` spend their time with."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    synchronize(device)
    # the host's operators are left out on a GPU: recording them slows it down, and the share of waiting would be wrong
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        for _ in range(count):
            update()
        synchronize(device)
    if not cuda:
        rows = profiler.key_averages()
        return Profile(None, None, {row.key: (1e-3 * row.self_cpu_time_total, row.count) for row in rows})
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    events = [e for e in events if not e.name.endswith(_WAITS)]
    return summarise((e.name, e.time_range.start, e.time_range.end) for e in events)


def summarise(kernels: Iterable[tuple[str, float, float]]) -> Profile:
    """The profile of kernels given as name, start and end in microseconds; they may overlap."""
    sums: dict[str, tuple[float, int]] = {}
    first, busy, reached = None, 0.0, float("-inf")
    for name, start, end in sorted(kernels, key=lambda k: k[1]):
        ms, calls = sums.get(name, (0.0, 0))
        sums[name] = (ms + 1e-3 * (end - start), calls + 1)
        first = start if first is None else first
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return Profile(1e-3 * (reached - first) if first is not None else 0.0, 1e-3 * busy, sums)


def profile_text(profile: Profile, what: str, most: int = 40) -> str:
    """The profile as Markdown: groups, then the ``most`` longest kernels."""
    total = sum(ms for ms, _ in profile.kernels.values()) or 1.0
    lines = [f"# {what}", ""]
    if profile.span_ms == 0.0:
        lines += ["The profiler recorded no kernel: the driver may not allow it (CUPTI).", ""]
    elif profile.busy_percent is not None:
        lines += [f"From the first kernel to the last: {profile.span_ms:.1f} ms, of which at least one ran during", ""]
        lines[-2] += f" {profile.busy_ms:.1f} ms ({profile.busy_percent:.1f} %)."
    else:
        lines += ["Time of the processor, for want of a GPU.", ""]
    lines += ["| group | ms | % |", "|---|---|---|"]
    lines += [f"| {name} | {0.01 * share * total:.2f} | {share:.1f} |" for name, share in profile.groups().items()]
    lines += ["", "| kernel | group | calls | ms | % |", "|---|---|---|---|---|"]
    longest = sorted(profile.kernels.items(), key=lambda item: -item[1][0])[:most]
    for name, (ms, calls) in longest:
        shown = name if len(name) <= 100 else name[:97] + "..."
        shown = shown.replace("|", "\\|")
        lines.append(f"| `{shown}` | {group_of(name)} | {calls} | {ms:.2f} | {100 * ms / total:.1f} |")
    return "\n".join(lines) + "\n"
