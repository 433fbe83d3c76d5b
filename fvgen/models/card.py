"""The README.md of a converted model."""

from __future__ import annotations

import torch

_ORIGINALS = {
    "viewcrafter": (
        "ViewCrafter",
        "https://github.com/Drexubery/ViewCrafter",
        "Yu et al., *ViewCrafter: Taming Video Diffusion Models for High-fidelity Novel View Synthesis*, arXiv 2409.02048",
        "the terms of ViewCrafter's authors, which are in that repository and on the page that the file was downloaded from",
    ),
    "dust3r": (
        "DUSt3R",
        "https://github.com/naver/dust3r",
        "Wang et al., *DUSt3R: Geometric 3D Vision Made Easy*, arXiv 2312.14132",
        "CC BY-NC-SA 4.0 (Naver Corporation), which allows non-commercial use only, and the terms of the data sets that its "
        "repository names",
    ),
}


def model_card(kind: str, source: str, sha256: str, variant: str, dtype: torch.dtype) -> str:
    """The text of a card.

    Args:
        kind: "viewcrafter" or "dust3r".
        source, sha256: name and SHA-256 of the checkpoint file.
        variant: which of its models it is.
        dtype: of the stored weights.
    """
    title, address, work, terms = _ORIGINALS[kind]
    return f"""# {title}, converted for FVGen

The weights of {title} ({address}), renamed and stored for FVGen by `fvgen convert {kind}`.
They were not trained further.

| | |
|---|---|
| original | {work} |
| source file | `{source}` |
| SHA-256 of the source file | `{sha256}` |
| variant | {variant} |
| stored as | {str(dtype).removeprefix("torch.")} |

Every file is listed in `SHA256SUMS`: `fvgen convert {kind} --verify --output DIR`, or `sha256sum -c SHA256SUMS`.

## Licence

FVGen's own licence does not cover these weights. They are under {terms}.
Read the original's licence at {address} before you use them or pass them on.
"""
