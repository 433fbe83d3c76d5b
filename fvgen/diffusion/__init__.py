"""Noise schedule, parameterisation and samplers."""

from .ddim import ddim_sample
from .few_step import few_step_sample
from .guidance import combine, guided
from .noise import NoiseSource, recorded_noise, seeded_noise
from .parameterisation import add_noise, eps_from_v, eps_from_x0, v_from_x0, velocity, x0_from_v
from .predict import PredictV, StepCallback, stack_conditions, unconditional, unet_predictor
from .schedule import NoiseSchedule
from .timesteps import make_timesteps

__all__ = [
    "NoiseSchedule",
    "NoiseSource",
    "PredictV",
    "StepCallback",
    "add_noise",
    "combine",
    "ddim_sample",
    "eps_from_v",
    "eps_from_x0",
    "few_step_sample",
    "guided",
    "make_timesteps",
    "recorded_noise",
    "seeded_noise",
    "stack_conditions",
    "unconditional",
    "unet_predictor",
    "v_from_x0",
    "velocity",
    "x0_from_v",
]
