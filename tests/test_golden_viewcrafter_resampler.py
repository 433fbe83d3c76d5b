"""The image projector against the reference resampler, with and without queries per frame."""

from __future__ import annotations

import pytest
import torch

from tests.models import reference
from tests.models.reference_models import image_projector

pytestmark = pytest.mark.golden
ROW = "`resampler`"


@pytest.mark.usefixtures("golden_device")
@pytest.mark.parametrize("name", reference.cases("resampler", ".output"))
@torch.no_grad()
def test_output_and_branches(name: str) -> None:
    atol = reference.tolerances(ROW)[0]
    projector = image_projector("resampler", f"{name}.weights.", f"{name}_config")
    found = {}
    for path, module in projector.named_modules():
        module.register_forward_hook(lambda _m, _i, out, path=path: found.__setitem__(path, out))
    values = reference.tensors("resampler", f"{name}.")
    reference.assert_close(projector(values["input"]), values["output"], atol)
    for key, expected in values.items():
        if key.startswith("act."):
            reference.assert_close(found[key.removeprefix("act.")], expected, atol)
