"""The noise schedule of the teacher: signal rate a_t, noise rate b_t and amplitude s_t for t = 0 .. 999."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fvgen.utils.errors import UserError

_SCALE_RAMP = 400  # steps over which s_t falls from 1 to the base scale


@dataclass(frozen=True)
class NoiseSchedule:
    """``x_t = a_t s_t x_0 + b_t eps`` with ``a_t = sqrt(abar_t)``, ``b_t = sqrt(1 - abar_t)``; float64 tables of length 1000.

    Attributes:
        betas, alphas_cumprod: beta_t and abar_t. The last abar is exactly 0 when made with zero terminal SNR.
        scale: s_t, by which a clean latent is multiplied before noise is added ("dynamic rescale").
    """

    betas: Tensor
    alphas_cumprod: Tensor
    scale: Tensor

    @staticmethod
    def create(
        base_scale: float = 0.7,
        num_steps: int = 1000,
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        zero_terminal_snr: bool = True,
    ) -> NoiseSchedule:
        """Betas linear in their square root, rescaled to zero terminal SNR (arXiv 2305.08891, algorithm 1).

        Args:
            base_scale: s_t at and after step 400: 0.7 for 320 x 512, 0.3 for 576 x 1024, 1 for none.
            num_steps: number of time steps.
            linear_start, linear_end: first and last beta before the rescale.
            zero_terminal_snr: shift and stretch sqrt(abar) so that its last value is 0 and its first is unchanged.
        """
        betas = torch.linspace(linear_start**0.5, linear_end**0.5, num_steps, dtype=torch.float64) ** 2
        if zero_terminal_snr:
            root = (1 - betas).cumprod(0).sqrt()
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            abar = root**2
            betas = 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
        abar = (1 - betas).cumprod(0)
        ramp = torch.linspace(1.0, base_scale, _SCALE_RAMP, dtype=torch.float64)
        tail = torch.full((max(num_steps - _SCALE_RAMP, 0),), base_scale, dtype=torch.float64)
        return NoiseSchedule(betas, abar, torch.cat([ramp, tail])[:num_steps])

    def __len__(self) -> int:
        return self.betas.shape[0]

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """Tables on ``device``, so that gathering with times there needs no transfer."""
        betas, abar, scale = (x.to(device) for x in (self.betas, self.alphas_cumprod, self.scale))
        return replace(self, betas=betas, alphas_cumprod=abar, scale=scale)

    def rates(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a_t, b_t, s_t) for times ``t [B]`` or a scalar, shaped to broadcast over ``like [B, ...]``.

        They are worked out in float64 and returned in ``like``'s dtype, but never below float32.
        """
        abar = self.alphas_cumprod.to(like.device)[t]
        dtype = torch.promote_types(like.dtype, torch.float32)
        shape = (-1,) + (1,) * (like.ndim - 1)
        tables = abar.sqrt(), (1 - abar).sqrt(), self.scale.to(like.device)[t]
        a, b, s = (x.to(dtype).reshape(shape) for x in tables)
        return a, b, s


def reference_buffers(schedule: NoiseSchedule, base_scale: float) -> dict[str, Tensor]:
    """The float32 schedule buffers a ViewCrafter checkpoint carries, for checking one against the computed schedule.

    ``scale_arr`` there has 1400 entries (the ramp precedes a full 1000), of which only the first 1000 can be indexed. The two
    ``sqrt_recip*`` buffers are all zero for v-prediction.
    """
    betas, abar = schedule.betas, schedule.alphas_cumprod
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    variance = betas * (1 - before) / (1 - abar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - abar).log(),
        "sqrt_recip_alphas_cumprod": torch.zeros_like(abar),
        "sqrt_recipm1_alphas_cumprod": torch.zeros_like(abar),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - abar),
        "scale_arr": torch.cat([schedule.scale[:_SCALE_RAMP], abar.new_full((len(schedule),), base_scale)]),
    }
    return {name: value.float() for name, value in buffers.items()}


def check_buffers(state: dict[str, Tensor], base_scale: float) -> None:
    """Compare the schedule buffers of a checkpoint with the computed ones.

    Args:
        state: a reference state dict; buffers it lacks are not compared.
        base_scale: that of the schedule the checkpoint is going to be used with.

    Raises:
        UserError: one differs, so that the checkpoint was trained with another schedule.
    """
    for name, expected in reference_buffers(NoiseSchedule.create(base_scale), base_scale).items():
        found = state.get(name)
        if found is not None and (found.shape != expected.shape or not torch.allclose(found.float(), expected, 1e-5, 1e-7)):
            raise UserError(f"the checkpoint's schedule differs in {name}; it is of another size, so give the other --variant")
