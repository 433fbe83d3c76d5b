"""Made-up DUSt3R checkpoints in the reference layout, and a network that knows the answer."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fvgen.geometry.conventions import invert_rigid
from fvgen.geometry.dust3r.pinhole import transform, unproject
from fvgen.models.dust3r import Dust3rNetwork, PointMap
from fvgen.models.dust3r.key_map import dust3r_key_map
from fvgen.types import Cameras

SIDE = 64
SMALL: dict[str, Any] = {
    "encoder_width": 32,
    "encoder_layers": 1,
    "encoder_heads": 2,
    "decoder_width": 16,
    "decoder_layers": 4,
    "decoder_heads": 2,
    "image_size": SIDE,
}
CONSTRUCTOR = (
    "AsymmetricCroCo3DStereo(pos_embed='RoPE100', img_size=(64, 64), head_type='dpt', output_mode='pts3d', "
    "depth_mode=('exp', -inf, inf), conf_mode=('exp', 1, inf), enc_embed_dim=32, enc_depth=1, enc_num_heads=2, "
    "dec_embed_dim=16, dec_depth=4, dec_num_heads=2)"
)


def random_state() -> tuple[dict[str, Tensor], Dust3rNetwork]:
    """A random state dict under the reference's names, second names and unused weights included; and the network it is of."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Dust3rNetwork(**SMALL).eval()
    with torch.no_grad():
        for head in (network.head_1, network.head_2):  # points in front of the camera, at different places
            head.conv_3.weight *= 30
            head.conv_3.bias.copy_(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    state = {theirs: network.state_dict()[ours] for ours, theirs in dust3r_key_map(network).items()}
    for number in (1, 2):
        scratch = f"downstream_head{number}.dpt.scratch."
        state |= {f"{scratch}layer_rn.{i}.weight": state[f"{scratch}layer{i + 1}_rn.weight"] for i in range(4)}
        unit = f"{scratch}refinenet4.resConfUnit1."
        state |= {f"{unit}conv{n}.weight": torch.zeros(256, 256, 3, 3) for n in (1, 2)}
        state |= {f"{unit}conv{n}.bias": torch.zeros(256) for n in (1, 2)}
    return state | {"mask_token": torch.zeros(1, 1, 16)}, network


def write_checkpoint(path: Path) -> Dust3rNetwork:
    """Writes a file as the original's training does."""
    state, network = random_state()
    torch.save({"args": argparse.Namespace(model=CONSTRUCTOR, lr=1e-4), "model": state, "epoch": 3}, path)
    return network


class KnowingNetwork:
    """In the place of a network: exact point maps of a scene, whatever the images show; each pair has a unit of its own.

    Args:
        cameras: of the photos at the network's image size; a list of one each where the sizes differ.
        depth: ``[V, H, W]`` z, or a list.
        side: long side of the images.
    """

    def __init__(self, cameras: Cameras | Sequence[Cameras], depth: Tensor | Sequence[Tensor], side: int) -> None:
        self.config, self.device, self.dtype = {"image_size": side}, torch.device("cpu"), torch.float32
        each = [cameras[n : n + 1] for n in range(len(cameras))] if isinstance(cameras, Cameras) else cameras
        self._poses = [c.world_from_cam[0].double() for c in each]
        K = [c.K[0].double() for c in each]
        self._points = [unproject(d.double(), k, pose) for d, k, pose in zip(depth, K, self._poses, strict=True)]
        self._unseen, self.seen = [(n, tuple(d.shape)) for n, d in enumerate(depth)], 0

    def encode(self, image: Tensor) -> Any:
        """Images of one size come in the order of the photos."""
        size = tuple(image.shape[2:])
        found = next(each for each in self._unseen if each[1] == size)
        self._unseen.remove(found)
        self.seen += 1
        return SimpleNamespace(index=found[0], size=size)

    def decode(self, first: Any, second: Any) -> tuple[PointMap, PointMap]:
        unit = 1 + 0.25 * first.index + 0.1 * second.index
        back = invert_rigid(self._poses[first.index])
        maps = []
        for each in (first, second):
            sure = torch.full((1, *each.size), 9.0 + first.index)
            maps.append(PointMap((unit * transform(back, self._points[each.index])).float()[None], sure))
        return maps[0], maps[1]
