"""The network as samplers see it: ``predict_v(x, t, condition)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from fvgen.types import Condition
from fvgen.utils.errors import UserError

PredictV = Callable[[Tensor, Tensor, Condition], Tensor]
StepCallback = Callable[[int, int, Tensor], None]


def unet_predictor(unet: nn.Module, autocast: torch.dtype | None = None) -> PredictV:
    """``predict_v`` of a video UNet: stacks the condition latents below the noisy ones; the result is float32.

    Args:
        unet: takes ``(x [B, C, T, h, w], t [B], context, fps)``.
        autocast: run the network under autocast of this dtype.
    """

    def predict_v(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(unet.parameters()).dtype
        stacked = torch.cat([x, condition.latents.to(x.dtype)], dim=1).to(dtype)
        context = condition.context.to(dtype)
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            return unet(stacked, t, context, condition.fps).float()

    return predict_v


def unconditional(condition: Condition) -> Condition:
    """The same condition with the context of the empty prompt and the grey image. Latents and frame rate stay.

    Raises:
        UserError: the condition was built without one.
    """
    if condition.uncond_context is None:
        raise UserError("guidance needs an unconditional context; build the condition with guidance=True")
    return replace(condition, context=condition.uncond_context)


def stack_conditions(*conditions: Condition) -> Condition:
    """Conditions one after the other along the batch."""
    return Condition(
        latents=torch.cat([c.latents for c in conditions]),
        context=torch.cat([c.context for c in conditions]),
        uncond_context=None,
        fps=torch.cat([c.fps for c in conditions]),
    )
