"""What the searches for tile sizes share, and what the one of the norms puts together."""

from __future__ import annotations

import pytest
import torch

from benchmarks.tuning import check, checked_times, cold, print_measured, print_ranked, repeats


def test_what_is_off_is_left_out_and_named(capsys):
    x = torch.tensor([1.0, -4.0])
    calls = {"right": lambda: x, "near": lambda: x + 0.039, "off": lambda: x + 0.041, "broken": lambda: x / torch.ones(3)}
    times = checked_times(calls, lambda several: float(len(several)), x, 0.01)
    assert times == {"right": 1.0, "near": 1.0}
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("off: ValueError: output 0 is off by 1.")
    assert told[1].startswith("broken: RuntimeError")
    assert checked_times({"unchecked": [lambda: x / 2] * 3}, lambda several: float(len(several))) == {"unchecked": 3.0}


def test_outputs_are_compared_one_by_one():
    a, b = torch.ones(3), torch.arange(3.0)
    check((a, b, "not compared"), (a, b), 0.0)
    with pytest.raises(ValueError, match="output 1 is off"):
        check((a, a), (a, b), 0.1)
    with pytest.raises(ValueError, match="shape"):
        check(a, a[:2], 0.1)


def test_a_call_that_differs_is_found():
    state = torch.zeros(2)
    repeats(lambda: (torch.ones(2), state))
    with pytest.raises(ValueError, match="differ"):
        repeats(lambda: state.add_(1).clone())


def test_the_fastest_comes_first(capsys):
    assert cold("cpu", rounds=2)([lambda: torch.ones(3)]) > 0
    print_ranked({"slow": 20.0, "fast": 10.0}, lambda microseconds: f"{100 / microseconds:.0f} GB/s")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["10.0", "us", "10", "GB/s", "fast"],
        ["20.0", "us", "5", "GB/s", "slow"],
    ]
    print_measured(["    (1, 2): Tiles(3,),", ""])
    assert capsys.readouterr().out == "\nMEASURED = {\n    (1, 2): Tiles(3,),\n}\n"


def test_the_search_of_the_norms():
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from benchmarks.tune_norms import DEFAULT, SEARCHES
    from fvgen.kernels.geglu.triton import FORWARD
    from fvgen.kernels.group_norm_silu.triton import JOINED, NORMALISED, SINGLE, STATISTICS, SUMMED
    from fvgen.kernels.group_norm_silu.triton_backward import GRADIENT, SMALL_WARPS, SUMS
    from fvgen.kernels.layer_norm_residual.triton import NARROW, NARROW_ROWS, WIDE, WIDE_ROWS

    # of several passes those that are taken
    expected = {
        ("group_norm_silu_backward", "small"): {"SMALL_WARPS"},
        ("group_norm_silu_backward", "across_programs"): {"SUMS", "GRADIENT"},
        ("group_norm_silu", "small"): {"SINGLE"},
        ("group_norm_silu", "residual"): {"SINGLE"},
        ("group_norm_silu", "frames_16x320x512_320"): {"STATISTICS", "JOINED", "NORMALISED"},
        ("group_norm_silu", "frames_16x320x512_320_residual"): {"SUMMED", "JOINED", "NORMALISED"},
        ("group_norm_silu_skip", "small"): {"SINGLE"},
        ("group_norm_silu_skip", "16x320x512_320_320"): {"SUMMED", "JOINED", "NORMALISED"},
        ("layer_norm_residual", "small"): {"NARROW_ROWS or WIDE_ROWS"},
    }
    found = {s.spec.name: s for s in SEARCHES}
    for (name, case), constants in expected.items():
        search = found[name]
        made = next(c for c in (*search.spec.cases, *search.spec.benchmarks) if c.name == case).make("meta", torch.float32)
        assert {n.split(" = ")[0] for n in search.of(made)} - {DEFAULT} == constants, (name, case)
    # the present choice is among the candidates, so that the search compares with what it says
    given = [settings for s in SEARCHES for settings in s.candidates.values()]
    passes = [{"first": SUMS}, {"last": GRADIENT}, {"first": STATISTICS}, {"first": SUMMED}, {"last": NORMALISED}]
    single = [{"single": SINGLE}, {"warps": SMALL_WARPS}]
    for present in (
        *passes,
        *single,
        {"joined": JOINED},
        {"launch": NARROW},
        {"launch": WIDE},
        {"launch": NARROW_ROWS},
        {"launch": WIDE_ROWS},
        {"tile": FORWARD},
    ):
        assert present in given
