"""Running mean of the divergence weights, for those who want the gradient's size not to depend on the divergence."""

from __future__ import annotations

import torch
from torch import Tensor

from fvgen.distill.divergences import get_divergence


class WeightMean:
    """Exponential moving average of the mean of h over whole updates, by which the next update's weights are divided.

    The mean of a single forward call will not do: with one sample h / mean(h) = 1, and the divergence would silently be reverse
    KL again. So the memory is long, the mean is over the clips of all calls and ranks, and an update is divided by what was known
    before it: its calls, which may be made one after the other, have one divisor.

    Args:
        divergence: whose h; the mean begins at h(1), where the student is as good as real.
        decay: at least 0.9.
    """

    def __init__(self, divergence: str, decay: float = 0.99) -> None:
        if not 0.9 <= decay < 1:
            raise ValueError(f"the decay of the running mean must lie in [0.9, 1), got {decay}")
        self.decay = decay
        self.value = torch.tensor(get_divergence(divergence).at_one)

    def update(self, mean: Tensor) -> None:
        """Takes in the mean h of an update's clips, a scalar."""
        now = mean.detach().float()
        self.value = self.decay * self.value.to(now.device) + (1 - self.decay) * now
