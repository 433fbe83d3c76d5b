"""Networks of a few numbers, so that every update of a method can be worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fvgen.diffusion.schedule import NoiseSchedule
from fvgen.distill.networks import Batch, Networks
from fvgen.distill.rollout import Process
from fvgen.types import Condition

SHAPE = (2, 3, 2, 2)  # C, T, h, w


class Scaled(nn.Module):
    """``v = w x + context mean``; counts its calls and remembers the times and whether a gradient was being recorded."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
        self.seen: list[tuple[Tensor, Tensor, bool]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.seen.append((x.detach(), t, torch.is_grad_enabled()))
        return self.weight * x + condition.context.mean((1, 2)).reshape(-1, 1, 1, 1, 1)


class Pooled(nn.Module):
    """``l = w mean(features)``."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, features: Tensor) -> Tensor:
        return self.weight * features.mean((1, 2, 3, 4))


class Toy:
    """A process, networks and a batch in float64; the trunk is a frozen elementwise function of the noisy latents."""

    def __init__(self, size: int = 4) -> None:
        torch.manual_seed(0)
        self.process = Process.create(NoiseSchedule.create())
        self.student, self.teacher, self.fake = Scaled(0.3), Scaled(0.5).requires_grad_(False), Scaled(0.4)
        self.trunk, self.head = Scaled(1.3).requires_grad_(False), Pooled()
        self.networks = Networks(self.student, self.teacher, self.fake, self.trunk, self.head)
        clean = torch.randn(size, *SHAPE, dtype=torch.float64)
        context, other = torch.randn(2, size, 3, 2, dtype=torch.float64).unbind(0)
        condition = Condition(torch.zeros_like(clean), context, other, torch.full((size,), 10))
        states = torch.randn(size, 4, *SHAPE, dtype=torch.float64)
        self.batch = Batch(clean, condition, states, torch.randn_like(clean))

    def gradients(self) -> dict[str, float | None]:
        """Gradient of every network's weight, None where it got none."""
        networks = {"student": self.student, "teacher": self.teacher, "fake": self.fake, "trunk": self.trunk, "head": self.head}
        return {name: None if n.weight.grad is None else n.weight.grad.item() for name, n in networks.items()}
