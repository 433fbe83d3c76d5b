"""Turns an :class:`OpSpec` into ``torch.ops.fvgen.<name>``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fvgen.kernels._dispatch import choose
from fvgen.kernels._spec import OpSpec

NAMESPACE = "fvgen"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def build_op(spec: OpSpec) -> Callable[..., Any]:
    """Registers schema, CPU and CUDA versions, fake and autograd, and returns the callable operator."""
    _library.define(spec.name + spec.schema, tags=(torch.Tag.pt2_compliant_tag,))

    def on_cuda(*args: Any) -> Any:
        return choose(spec, args)(*args)

    _library.impl(spec.name, spec.reference, "CPU")
    _library.impl(spec.name, on_cuda, "CUDA")
    qualified = f"{NAMESPACE}::{spec.name}"
    torch.library.register_fake(qualified, spec.fake, lib=_library)
    if spec.backward is not None:
        torch.library.register_autograd(qualified, spec.backward, setup_context=spec.setup_context, lib=_library)
    return getattr(torch.ops.fvgen, spec.name).default
