"""The runs that the paper compares (its tables 2 and 3), each a sequence of methods."""

from __future__ import annotations

from collections.abc import Callable

from fvgen.distill.configs import MatchingConfig, RegressionConfig, StageOneConfig
from fvgen.distill.methods import DistributionMatching, Method, OdeRegression, StageOne
from fvgen.distill.rollout import Process

_PLAIN = MatchingConfig(divergence="reverse_kl")
# The weight is of the order of DMD2's; the comparison's authors state none.
_DMD2 = MatchingConfig(divergence="reverse_kl", adversarial_weight=5e-3)

RUNS: dict[str, Callable[[Process], tuple[Method, ...]]] = {
    "fvgen": lambda p: (StageOne(p, StageOneConfig()), DistributionMatching(p, MatchingConfig())),
    "stage_one_only": lambda p: (StageOne(p, StageOneConfig()),),
    "no_stage_one": lambda p: (DistributionMatching(p, MatchingConfig()),),
    "reverse_kl": lambda p: (StageOne(p, StageOneConfig()), DistributionMatching(p, _PLAIN)),
    "dmd2": lambda p: (DistributionMatching(p, _DMD2),),
    "causvid": lambda p: (OdeRegression(p, RegressionConfig()), DistributionMatching(p, _PLAIN)),
}


def stage_iterations(name: str, iterations: tuple[int, ...]) -> tuple[int, ...]:
    """Student updates of each of a run's methods, of those of the full method's two stages; DMD2 does both stages at once."""
    first, second = iterations
    return {"stage_one_only": (first,), "no_stage_one": (second,), "dmd2": (first + second,)}.get(name, (first, second))


def make_run(name: str, process: Process) -> tuple[Method, ...]:
    """The methods of a run, one after the other.

    In ``dmd2`` the classifier looks through the frozen teacher, as everywhere here, not through the fake score as in arXiv
    2405.14867: so the runs differ in their objective alone.

    Args:
        name: a key of ``RUNS``.
        process: the forward process, shared by all.

    Raises:
        ValueError: there is no such run.
    """
    if name not in RUNS:
        raise ValueError(f"run must be one of {', '.join(RUNS)}, got {name!r}")
    return RUNS[name](process)
