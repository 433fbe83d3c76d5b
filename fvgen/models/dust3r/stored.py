"""A converted DUSt3R network as a directory.

config.json, diffusion_pytorch_model.safetensors      the network, in diffusers' layout; the weights may be in several files
report.json                                           where it came from, what became of every weight
README.md                                             the same in words
SHA256SUMS                                            of all files
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.io.digests import verify_sums, write_sums
from fvgen.models.card import model_card
from fvgen.models.tensor_files import load_tensors, save_tensors, weight_files
from fvgen.models.weights_file import checked_sha256
from fvgen.utils.errors import UserError

from .checkpoint import load_dust3r
from .key_map import dust3r_key_map, standard_state, unused_reason
from .network import Dust3rNetwork

KIND = "fvgen dust3r"
CONFIG_FILE, REPORT_FILE, CARD_FILE = "config.json", "report.json", "README.md"


def key_report(state: dict[str, Tensor], network: Dust3rNetwork) -> dict[str, Any]:
    """What becomes of every key of a reference state dict: counts, and the unused ones with their reasons.

    Args:
        state: under reference names.
        network: made of it.
    """
    reasons: dict[str, list[str]] = {}
    for key in sorted(state):
        if reason := unused_reason(key):
            reasons.setdefault(reason, []).append(key)
    used = standard_state(state)
    unused = sum(map(len, reasons.values()))
    return {
        "in_the_checkpoint": len(state),
        "converted": len(dust3r_key_map(network)),
        "second_names_of_the_same_tensor": len(state) - unused - len(set(used) & set(state)),
        "second_decoder_copied_from_the_first": not any(key.startswith("dec_blocks2.") for key in state),
        "unused": reasons,
    }


def write_dust3r(
    network: Dust3rNetwork,
    directory: str | os.PathLike[str],
    facts: dict[str, Any],
    dtype: torch.dtype,
    written: Callable[[int], None] | None = None,
) -> None:
    """Writes network, report, card and checksums into an empty folder.

    Args:
        network: on any device.
        directory: exists.
        facts: for the report; ``source`` with name and SHA-256 for the card.
        dtype: of the stored weights.
        written: called with the bytes of every weight that is written, and of every piece that is read again for the checksums.

    Raises:
        UserError: a weight is not finite in ``dtype``, or the disk is full.
    """
    root = Path(directory)
    network.save_config(root)
    save_tensors(network.state_dict(), root, dtype, written)
    report = {"kind": KIND, **facts}
    (root / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    source = facts.get("source", {})
    card = model_card(
        "dust3r", source.get("name", ""), source.get("sha256", ""), f"{network.config['image_size']} with DPT head", dtype
    )
    (root / CARD_FILE).write_text(card, encoding="utf-8")
    write_sums(root, written)


def read_dust3r(path: str | os.PathLike[str], verify: bool = False) -> Dust3rNetwork:
    """The network, in float32 and eval mode, of a directory written by :func:`write_dust3r` or of a reference checkpoint file.

    Args:
        path: of either.
        verify: compare a directory's files with their checksums first, or a checkpoint's tensors with those in the file.

    Raises:
        UserError: there is neither, or it is damaged.
    """
    from safetensors import SafetensorError

    root = Path(path)
    if root.is_file():
        if verify:
            checked_sha256(root)
        return load_dust3r(root)
    missing = [name for name in network_files(root) if not (root / name).is_file()]
    if missing:
        raise UserError(f"{root} holds no DUSt3R network ({', '.join(missing)} missing); make one with `fvgen convert dust3r`")
    if verify:
        verify_dust3r(root)
    try:
        with torch.device("meta"):
            network = Dust3rNetwork.from_config(Dust3rNetwork.load_config(root))
        state = {name: value.float() for name, value in load_tensors(root).items()}
        network.load_state_dict(state, strict=True, assign=True)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the DUSt3R network in {root} cannot be loaded ({reason}); convert the checkpoint again") from error
    return network.eval()


def network_files(root: Path) -> list[str]:
    """Names of the files of a directory that make up the network."""
    return [CONFIG_FILE, *weight_files(root)]


def verify_dust3r(directory: str | os.PathLike[str]) -> dict[str, str]:
    """Compares the files of a directory with its checksums and returns them, ``{name: SHA-256}``.

    Raises:
        UserError: it is none of DUSt3R's, has no checksums, or a file differs or is missing.
    """
    read_report(directory)
    root = Path(directory)
    return verify_sums(root, [*network_files(root), REPORT_FILE])


def read_report(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The report of a directory written by :func:`write_dust3r`.

    Raises:
        UserError: there is none.
    """
    try:
        report = json.loads((Path(directory) / REPORT_FILE).read_text(encoding="utf-8"))
        if report["kind"] != KIND:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{directory} is no directory written by `fvgen convert dust3r`; give one") from None
    return report
