"""Which sizes a network can have. Others would fail far from their cause, or run and be wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fvgen.utils.errors import UserError

PATCH = 16  # the heads give a square of 16 pixels for every token
_LEAST = {
    "encoder_width": 4,
    "encoder_layers": 1,
    "encoder_heads": 1,
    "decoder_width": 4,
    "decoder_layers": 2,  # the heads read the encoder and three depths behind at least one block
    "decoder_heads": 1,
    "feature_width": 2,
    "last_width": 1,
    "image_size": PATCH,
}
_REMEDY = "use the sizes of a DUSt3R checkpoint"


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Checks all arguments of :class:`fvgen.models.dust3r.network.Dust3rNetwork`.

    Raises:
        UserError: no network can have these sizes; names the first that is wrong.
    """
    for name, least in _LEAST.items():
        if not isinstance(sizes[name], int) or sizes[name] < least:
            raise UserError(f"{name}={sizes[name]!r} is no size of a DUSt3R network (whole number from {least}); {_REMEDY}")
    if sizes["patch_size"] != PATCH:
        raise UserError(f"patch_size={sizes['patch_size']!r} is not supported, the heads are made for {PATCH}; {_REMEDY}")
    for name in ("encoder", "decoder"):
        width, heads = sizes[f"{name}_width"], sizes[f"{name}_heads"]
        if width % (4 * heads):
            raise UserError(
                f"the {name}'s width of {width} does not divide into {heads} heads of a multiple of four channels, "
                f"which the rotary positions need; {_REMEDY}"
            )
    base, ratio, widths = sizes["rope_base"], sizes["mlp_ratio"], sizes["layer_widths"]
    if not (_is_number(base) and base > 0):
        raise UserError(f"rope_base={base!r} gives no rotary positions; {_REMEDY}")
    if not (_is_number(ratio) and ratio * min(sizes["encoder_width"], sizes["decoder_width"]) >= 1):
        raise UserError(f"mlp_ratio={ratio!r} leaves the MLPs no width; {_REMEDY}")
    if not (isinstance(widths, list | tuple) and len(widths) == 4 and all(isinstance(w, int) and w > 0 for w in widths)):
        raise UserError(f"layer_widths={widths!r} are not the four widths of a head; {_REMEDY}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
