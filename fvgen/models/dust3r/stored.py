"""A converted DUSt3R network as a directory.

config.json, diffusion_pytorch_model.safetensors      the network, in diffusers' layout
report.json                                           where it came from, what became of every weight, SHA-256 of both files
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fvgen.utils.errors import UserError

from .checkpoint import load_dust3r
from .key_map import dust3r_key_map, standard_state, unused_reason
from .network import Dust3rNetwork

KIND = "fvgen dust3r"
CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE = "config.json", "diffusion_pytorch_model.safetensors", "report.json"


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


def write_dust3r(network: Dust3rNetwork, directory: str | os.PathLike[str], facts: dict[str, Any], dtype: torch.dtype) -> None:
    """Writes network and report into an empty folder.

    Args:
        network: on any device.
        directory: exists.
        facts: for the report.
        dtype: of the stored weights.
    """
    from safetensors.torch import save_file

    root = Path(directory)
    network.save_config(root)
    weights = {name: value.detach().to("cpu", dtype).contiguous() for name, value in network.state_dict().items()}
    save_file(weights, root / WEIGHTS_FILE, metadata={"format": "pt"})
    digests = {name: file_sha256(root / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    report = {"kind": KIND, **facts, "sha256": digests}
    (root / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def read_dust3r(path: str | os.PathLike[str]) -> Dust3rNetwork:
    """The network, in float32 and eval mode, of a directory written by :func:`write_dust3r` or of a reference checkpoint file.

    Raises:
        UserError: there is neither, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    root = Path(path)
    if root.is_file():
        return load_dust3r(root)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (root / name).is_file()]
    if missing:
        raise UserError(f"{root} holds no DUSt3R network ({', '.join(missing)} missing); make one with `fvgen convert dust3r`")
    try:
        with torch.device("meta"):
            network = Dust3rNetwork.from_config(Dust3rNetwork.load_config(root))
        state = {name: value.float() for name, value in load_file(root / WEIGHTS_FILE).items()}
        network.load_state_dict(state, strict=True, assign=True)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the DUSt3R network in {root} cannot be loaded ({reason}); convert the checkpoint again") from error
    return network.eval()


def verify_dust3r(directory: str | os.PathLike[str]) -> dict[str, str]:
    """Compares the files of a directory with the SHA-256 in its report and returns them.

    Raises:
        UserError: it has no report, or a file differs.
    """
    digests = read_report(directory).get("sha256", {})
    for name, expected in digests.items():
        file = Path(directory) / name
        if not file.is_file() or file_sha256(file) != expected:
            raise UserError(f"{file} differs from its checksum; convert the checkpoint again")
    return digests


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


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
