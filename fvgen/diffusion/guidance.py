"""Classifier-free guidance (arXiv 2207.12598) with the rescale of arXiv 2305.08891."""

from __future__ import annotations

from torch import Tensor

from fvgen.types import Condition

from .predict import PredictV, stack_conditions, unconditional


def combine(cond: Tensor, uncond: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """``uncond + scale (cond - uncond)``: scale 1 is the conditional prediction itself.

    Args:
        cond, uncond: ``[B, ...]`` predictions.
        scale: guidance scale.
        rescale: 0 .. 1, how far the standard deviation per sample is pulled back to the conditional one's.
    """
    guided = uncond + scale * (cond - uncond)
    if rescale == 0.0:
        return guided
    axes = tuple(range(1, cond.ndim))
    ratio = cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True)
    return guided * (rescale * ratio + (1 - rescale))


def guided(predict_v: PredictV, scale: float, rescale: float = 0.0, batched: bool = False) -> PredictV:
    """``predict_v`` with guidance. Scale 1 calls the network once and ignores ``rescale``.

    Args:
        predict_v: the network.
        scale, rescale: as in :func:`combine`.
        batched: run both branches in one call of twice the batch.
    """
    if scale == 1.0:
        return predict_v

    def predict(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        other = unconditional(condition)
        if batched:
            both = predict_v(x.repeat(2, *[1] * (x.ndim - 1)), t.repeat(2), stack_conditions(condition, other))
            cond, uncond = both.chunk(2)
        else:
            cond, uncond = predict_v(x, t, condition), predict_v(x, t, other)
        return combine(cond, uncond, scale, rescale)

    return predict
