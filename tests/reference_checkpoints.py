"""Random checkpoints in the exact layout of the originals, of any size.

At full size (10.4 and 2.3 GB, not a part of any test) a file and its conversion are made by

    python -m tests.reference_checkpoints viewcrafter full model_sparse.ckpt        # 12 GB of memory
    python -m tests.reference_checkpoints dust3r full dust3r.pth                    # 3 GB
    fvgen convert viewcrafter model_sparse.ckpt --output viewcrafter
    fvgen convert dust3r dust3r.pth --output dust3r
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.diffusion.schedule import NoiseSchedule, reference_buffers
from fvgen.models.bundle import ModelBundle, build_component
from fvgen.models.clip import ClipTextTower
from fvgen.models.dust3r import Dust3rNetwork
from fvgen.models.dust3r.key_map import reference_shapes as dust3r_shapes
from fvgen.models.key_map import KEY_MAPS, PREFIXES, reference_shapes
from fvgen.models.spec import COMPONENTS, ModelSpec
from fvgen.recipes.presets import get_preset

LAYOUTS = ("state_dict", "module")
_CONSTRUCTOR = (
    "AsymmetricCroCo3DStereo(pos_embed='RoPE100', img_size=({image_size}, {image_size}), head_type='dpt', output_mode='pts3d', "
    "depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf), patch_embed_cls='ManyAR_PatchEmbed', "
    "enc_embed_dim={encoder_width}, enc_depth={encoder_layers}, enc_num_heads={encoder_heads}, "
    "dec_embed_dim={decoder_width}, dec_depth={decoder_layers}, dec_num_heads={decoder_heads})"
)


def viewcrafter_spec(size: str) -> ModelSpec:
    """Of a "tiny", "middle" (about 300 MB in float32) or "full" model."""
    if size == "full":
        return get_preset("viewcrafter_512")
    tiny = get_preset("tiny")
    small_vae = {**tiny.vae, "block_out_channels": (16, 16)}
    text = {"vocab_size": 49408, "width": 64, "layers": 3, "heads": 2}
    if size == "tiny":
        return replace(tiny, unet={**tiny.unet, "model_channels": 32}, vae=small_vae, text_encoder=text)
    return replace(tiny, unet={**tiny.unet, "model_channels": 320}, vae=small_vae, text_encoder=text)


def viewcrafter_modules(spec: ModelSpec) -> dict[str, Any]:
    """The networks of a checkpoint, without memory for weights."""
    with torch.device("meta"):
        modules = {name: build_component(name, getattr(spec, name)) for name in COMPONENTS}
        return modules | {"text_encoder": ClipTextTower(**spec.text_encoder)}


def viewcrafter_state(
    spec: ModelSpec, bundle: ModelBundle | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    """A state dict under the reference's names, with every key that it has; random weights, or those of ``bundle``."""
    modules = viewcrafter_modules(spec)
    shapes = reference_shapes(modules)
    buffers = reference_buffers(NoiseSchedule.create(spec.index.base_scale), spec.index.base_scale)
    state = _random({name: shape for name, shape in shapes.items() if name not in buffers}, dtype, seed)
    for name in COMPONENTS if bundle is not None else ():
        weights = getattr(bundle, name).state_dict()
        for ours, theirs in KEY_MAPS[name](modules[name]).items():
            state[PREFIXES[name] + theirs] = weights[ours].reshape(shapes[PREFIXES[name] + theirs]).to(dtype)
    return {name: buffers[name] if name in buffers else state[name] for name in shapes}


def write_viewcrafter(path: Path, state: Mapping[str, Tensor], layout: str = "state_dict") -> None:
    """Writes a file as Lightning does, with the older name of a layer, or as DeepSpeed does."""
    if layout == "module":
        torch.save({"module": {f"_forward_module.{key}": value for key, value in state.items()}, "global_steps": 7}, path)
    else:
        older = {key.replace("fps_embedding", "framestride_embed"): value for key, value in state.items()}
        torch.save({"state_dict": older, "epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.9.3"}, path)


def dust3r_arguments(size: str) -> dict[str, int]:
    """Of a "tiny", "middle" (about 200 MB in float32) or "full" network."""
    names = ("encoder_width", "encoder_layers", "encoder_heads", "decoder_width", "decoder_layers", "decoder_heads", "image_size")
    values = {"tiny": (32, 1, 2, 16, 4, 2, 64), "middle": (512, 12, 8, 256, 4, 4, 64), "full": (1024, 24, 16, 768, 12, 12, 512)}
    return dict(zip(names, values[size], strict=True))


def dust3r_state(size: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """A state dict under the reference's names; second names stand for the same tensors."""
    with torch.device("meta"):
        network = Dust3rNetwork(**dust3r_arguments(size))
    state = _random(dust3r_shapes(network), dtype, seed)
    for number in (1, 2):
        scratch = f"downstream_head{number}.dpt.scratch."
        state |= {f"{scratch}layer_rn.{i}.weight": state[f"{scratch}layer{i + 1}_rn.weight"] for i in range(4)}
    return state


def write_dust3r(path: Path, size: str, state: Mapping[str, Tensor]) -> None:
    """Writes a file as the original's training does."""
    args = argparse.Namespace(model=_CONSTRUCTOR.format(**dust3r_arguments(size)), lr=1e-4)
    torch.save({"args": args, "model": dict(state), "epoch": 3}, path)


def _random(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Of a size that a forward pass survives."""
    random, state = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=random, dtype=dtype)
        if len(shape) > 1:
            values *= torch.Size(shape[1:]).numel() ** -0.5
        else:
            values = values.mul_(0.1).add_(0.0 if name.endswith("bias") else 1.0)
        state[name] = values
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("viewcrafter", "dust3r"))
    parser.add_argument("size", choices=("tiny", "middle", "full"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--half", action="store_true", help="float16 weights")
    chosen = parser.parse_args()
    dtype = torch.float16 if chosen.half else torch.float32
    if chosen.kind == "dust3r":
        write_dust3r(chosen.file, chosen.size, dust3r_state(chosen.size, dtype))
    else:
        write_viewcrafter(chosen.file, viewcrafter_state(viewcrafter_spec(chosen.size), None, dtype))


if __name__ == "__main__":
    main()
