"""Single blocks of the UNet against the reference, built from the constructor arguments in the manifest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fvgen.models import blocks, key_map
from fvgen.models.embeddings import sinusoidal_embedding
from tests.models import reference

pytestmark = pytest.mark.golden
FILE = "temporal_transformer"
TEXT_TOKENS = 77


def _build(c: dict[str, Any]) -> tuple[nn.Module, dict[str, str]]:
    """The block that a set of constructor arguments belongs to, and its key map."""
    if "only_self_att" in c:
        assert c["only_self_att"]
        distance = c["temporal_length"] if c["relative_position"] else None
        temporal = blocks.TemporalTransformer(
            c["in_channels"], c["n_heads"], c["d_head"], c["depth"], c["causal_attention"], distance
        )
        return temporal, key_map.transformer_key_map(temporal)
    if "n_heads" in c:
        learnable = c.get("image_cross_attention_scale_learnable", False)
        image = c["image_cross_attention"]
        args = c["in_channels"], c["n_heads"], c["d_head"], c["context_dim"], c["depth"], image, learnable
        spatial = blocks.SpatialTransformer(*args)
        return spatial, key_map.transformer_key_map(spatial)
    if "emb_channels" in c:
        res = blocks.ResBlock(c["channels"], c["out_channels"], c["emb_channels"], c["dropout"], c["use_temporal_conv"])
        return res, key_map.res_block_key_map(res)
    if "in_channels" in c:
        conv = blocks.TemporalConv(c["in_channels"], c["dropout"])
        return conv, key_map.temporal_conv_key_map(conv)
    raise AssertionError(f"no block for {c}")


def _build_any(c: dict[str, Any], weights: dict[str, Tensor]) -> tuple[nn.Module, dict[str, str]]:
    if "use_conv" not in c:
        return _build(c)
    kind, theirs = (blocks.Downsample, "op") if "op.weight" in weights else (blocks.Upsample, "conv")
    return kind(c["channels"]), {f"conv.{k}": f"{theirs}.{k}" for k in ("weight", "bias")}


def _clip_to_frames(x: Tensor) -> tuple[Tensor, int]:
    return x.transpose(1, 2).flatten(0, 1), x.shape[2]


def _call(block: nn.Module, inputs: dict[str, Tensor], kwargs: dict[str, Any]) -> Tensor:
    x = inputs["x"]
    if isinstance(block, blocks.TemporalTransformer | blocks.TemporalConv):
        frames, length = _clip_to_frames(x)
        return block(frames, length).unflatten(0, (x.shape[0], length)).transpose(1, 2)
    if isinstance(block, blocks.SpatialTransformer):
        text, image = inputs["context"].split([TEXT_TOKENS, inputs["context"].shape[1] - TEXT_TOKENS], dim=1)
        return block(x, text, image if image.shape[1] else None)
    if isinstance(block, blocks.ResBlock):
        return block(x, inputs["emb"], x.shape[0] // kwargs["batch_size"] if "batch_size" in kwargs else None)
    return block(x)


CASES = [
    (block, case) for block in reference.keys_of(FILE) if block != "tensors" for case in reference.keys_of(FILE, block, "cases")
]


@pytest.mark.usefixtures("golden_device")
@pytest.mark.parametrize(("name", "case"), CASES)
def test_block(name: str, case: str) -> None:
    entry = reference.manifest(FILE)[name]
    weights = reference.tensors(FILE, f"{name}.weights.")
    block, names = _build_any(entry["constructor"], weights)
    reference.load(block, names, weights)
    prefix = name if case == "default" else f"{name}.{case}"
    inputs = reference.tensors(FILE, f"{prefix}.input.")
    with torch.no_grad():
        output = _call(block, inputs, entry["cases"][case]["call_kwargs"])
    expected = reference.tensors(FILE, f"{prefix}.output")[""]
    reference.assert_close(output, expected, reference.tolerances("single blocks")[0])


@pytest.mark.parametrize("name", reference.cases(FILE, prefix="timestep_embedding."))
def test_timestep_embedding(name: str) -> None:
    values = reference.tensors(FILE, "timestep_embedding.")
    table = name.removeprefix("timestep_embedding.")
    if "dim" not in table:
        return
    times = values["fractional_t"] if table.startswith("fractional") else values["timesteps"]
    width = values[table].shape[1]
    half = width // 2
    # The exponential of a frequency is rounded differently by different vector units; one ulp of it moves the angle by this.
    ulp = times[:, None] * 10000.0 ** (-torch.arange(half) / half) * 2**-23
    bound = reference.tolerances("single blocks")[0] + F.pad(torch.cat([ulp, ulp], dim=1), (0, width - 2 * half))
    assert ((sinusoidal_embedding(times, width) - values[table]).abs() <= bound).all()
