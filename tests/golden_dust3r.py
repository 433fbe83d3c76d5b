"""Reads the DUSt3R golden files: tensors, manifests, the tiny network under reference names."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fvgen.models.dust3r import Dust3rNetwork, convert_dust3r
from tests import golden

GROUP = "dust3r"
MISSING = "missing"


def manifest(name: str) -> dict[str, Any]:
    return json.loads(golden.path(GROUP, f"{name}.json").read_text())


def tensors(name: str, prefix: str = "") -> dict[str, Tensor]:
    """Tensors whose name starts with ``prefix``, without it."""
    found = load_file(golden.path(GROUP, f"{name}.safetensors"), device=golden.device())
    return {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}


def cases(name: str, prefix: str = "") -> list[str]:
    """Keys of a manifest with ``prefix``, for parametrising; a placeholder where the file is missing, whose test is skipped."""
    if not golden.available(GROUP, f"{name}.json"):
        return [MISSING]
    return [k for k, v in manifest(name).items() if isinstance(v, dict) and k.startswith(prefix)]


def tiny_arguments() -> dict[str, Any]:
    """Arguments of the tiny network, from its configuration in the manifest."""
    config = manifest("manifest_tiny")["tiny_config"]
    return {
        "patch_size": config["patch_size"],
        "encoder_width": config["enc_embed_dim"],
        "encoder_layers": config["enc_depth"],
        "encoder_heads": config["enc_num_heads"],
        "decoder_width": config["dec_embed_dim"],
        "decoder_layers": config["dec_depth"],
        "decoder_heads": config["dec_num_heads"],
        "mlp_ratio": config["mlp_ratio"],
        "layer_widths": config["layer_dims"],
        "feature_width": config["feature_dim"],
        "last_width": config["last_dim"],
    }


def tiny_network() -> Dust3rNetwork:
    return _tiny_network(golden.device())


@cache
def _tiny_network(device: str) -> Dust3rNetwork:
    return convert_dust3r(tensors("tiny_weights"), **tiny_arguments()).to(device)


def assert_points_close(actual: Tensor, expected: Tensor) -> None:
    """The golden's stated tolerance: 1e-4 of a point's norm plus 1e-5."""
    error = (actual - expected).norm(dim=-1)
    excess = error - (1e-4 * expected.norm(dim=-1) + 1e-5)
    assert excess.max() <= 0, f"largest error {error.max():.2e}"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
