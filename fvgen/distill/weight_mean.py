"""Running mean of the divergence weights, for those who want the gradient's size not to depend on the divergence."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class WeightMean:
    """Exponential moving average of mean h.

    The mean of a single rank's batch will not do: with one sample per rank h / mean(h) = 1, and the divergence would silently be
    reverse KL again. So the memory is long, and the mean is over all ranks.

    Args:
        decay: at least 0.9.
        all_mean: averages a scalar over the ranks; None on one rank.
    """

    def __init__(self, decay: float = 0.99, all_mean: Callable[[Tensor], Tensor] | None = None) -> None:
        if not 0.9 <= decay < 1:
            raise ValueError(f"the decay of the running mean must lie in [0.9, 1), got {decay}")
        self.decay, self._all_mean = decay, all_mean
        self.value: Tensor | None = None

    def update(self, weights: Tensor) -> Tensor:
        """The mean after taking in weights ``[B]``; a scalar without gradient, to be saved with the state of the run."""
        now = weights.detach().float().mean()
        now = now if self._all_mean is None else self._all_mean(now)
        self.value = now if self.value is None else self.decay * self.value + (1 - self.decay) * now
        return self.value
