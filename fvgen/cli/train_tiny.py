"""``fvgen train-tiny``: trains the small model's autoencoder and teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

from fvgen.cli.parser import given
from fvgen.io.outputs import check_output
from fvgen.utils.device import choose_device


def run(arguments: argparse.Namespace) -> None:
    """Trains in the folder of a run, which gets a model directory."""
    device = choose_device(arguments.device)
    if not Path(arguments.output).exists():  # otherwise an interrupted run goes on
        check_output(arguments.output, need_bytes=2**27)
    from fvgen.pretrain.tiny import train_tiny

    limits = given(arguments, ("vae_steps", "teacher_steps", "vae_minutes", "teacher_minutes"))
    scores = train_tiny(output=arguments.output, device=device, seed=arguments.seed, **limits)
    print(f"model          {Path(arguments.output) / 'model'}")
    for name, value in sorted(scores.items()):
        print(f"  {name:<20} {value:.3f}")
