"""Loads the compiled binding ``fvgen/_C*.so`` once and remembers why it could not be."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path

from fvgen import envs


def find() -> Path | None:
    """Path of the compiled binding, None where the package was installed without it."""
    folders = [Path(envs.__file__).parent]
    # started in a checkout, its fvgen/ hides the installed package that has the binary
    folders += [Path(str(d.locate_file("fvgen"))) for d in metadata.distributions(name="fvgen")]
    return next((f / "_C.abi3.so" for f in folders if (f / "_C.abi3.so").is_file()), None)


@cache
def load() -> str | None:
    """Makes ``torch.ops.fvgen_cuda`` available; returns None, or the reason why it is not.

    The binding is never loaded under a PyTorch without CUDA.
    """
    import torch

    if torch.version.cuda is None:
        return "this PyTorch has no CUDA"
    path = find()
    if path is None:
        return "fvgen was installed without its CUDA extension; installing with FVGEN_BUILD_CUDA=1 builds it or says why not"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return None
