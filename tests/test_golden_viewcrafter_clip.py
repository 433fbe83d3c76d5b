"""Both CLIP towers and the image preprocessing against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fvgen.models.clip import ClipTextTower, ClipVisionTower
from fvgen.models.clip_preprocess import clip_preprocess
from fvgen.models.key_map import PREFIXES, component_keys, ignored_reason, image_encoder_key_map, text_encoder_key_map
from fvgen.models.reference_config import image_encoder_arguments, text_encoder_arguments
from fvgen.models.tokenizer import PROMPT, tokenize
from fvgen.utils.errors import UserError
from tests import golden
from tests.models import reference

pytestmark = pytest.mark.golden
ROW, FILE = "`clip_tiny`", "clip_tiny"


def _config(side: str) -> dict:
    return reference.manifest(FILE)["config"][side]


@pytest.fixture(scope="module")
def vision(golden_device: str) -> ClipVisionTower:
    tower = ClipVisionTower(**image_encoder_arguments(_config("vision_cfg")))
    weights = reference.tensors(FILE, "vision.weights.model.")
    used = {k: weights[k] for k in weights if ignored_reason(PREFIXES["image_encoder"] + k) is None}
    reference.load(tower, image_encoder_key_map(tower), used)
    return tower


@pytest.mark.usefixtures("golden_device")
@pytest.mark.parametrize("skip_last", [0, 1])
@torch.no_grad()
def test_text(skip_last: int) -> None:
    values = reference.tensors(FILE, "text.")
    arguments = text_encoder_arguments(_config("text_cfg"))
    blocks = arguments["layers"] - skip_last
    tower = ClipTextTower(**arguments, skip_last=skip_last)
    weights = {k.removeprefix("weights.model."): v for k, v in values.items() if k.startswith("weights.")}
    weights = {k: v for k, v in weights.items() if ignored_reason(PREFIXES["text_encoder"] + k, blocks) is None}
    table = torch.zeros_like(tower.token_embedding.weight, device=golden.device())
    table[values["token_embedding_ids"]] = values["token_embedding_rows"]
    reference.load(tower, text_encoder_key_map(tower), weights | {"token_embedding.weight": table})
    expected = values["output_penultimate" if skip_last else "output_last"]
    reference.assert_close(tower(values["tokens"]), expected, reference.tolerances(ROW)[0])


def test_token_ids() -> None:
    tokens = reference.tensors(FILE, "text.")["tokens"]
    for prompt, expected in zip(reference.manifest(FILE)["prompts"], tokens.tolist(), strict=True):
        if prompt in (PROMPT, ""):
            assert tokenize(prompt) == expected
        else:
            with pytest.raises(UserError, match="can be used without CLIP's vocabulary"):
                tokenize(prompt)


def _image(case: str) -> Tensor:
    values = reference.tensors(FILE, f"vision.{case}.")
    return (
        values["image_u8"].float() / 255 * 2 - 1 if "image_u8" in values else torch.zeros(1, 3, 224, 224, device=golden.device())
    )


CASES = [c.removeprefix("vision.") for c in reference.cases(FILE, ".output", "vision.")]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_vision(vision: ClipVisionTower, case: str) -> None:
    expected = reference.tensors(FILE, f"vision.{case}.")
    reference.assert_close(vision(_image(case)), expected["output"], reference.tolerances(ROW)[0])


@pytest.mark.usefixtures("golden_device")
@pytest.mark.parametrize("case", CASES)
def test_preprocessing(case: str) -> None:
    expected, atol = reference.tensors(FILE, f"vision.{case}."), reference.tolerances(ROW)[0]
    actual = clip_preprocess(_image(case))
    if "preprocessed_rows" in expected:
        reference.assert_close(actual[:, :, ::37], expected["preprocessed_rows"], atol)
    if "preprocessed_ch1" in expected:
        reference.assert_close(actual[:, 1:2], expected["preprocessed_ch1"], atol)
    if "preprocessed_pixel" in expected:
        reference.assert_close(actual[0, :, 0, 0], expected["preprocessed_pixel"], atol)


def test_component_keys_leave_out_what_is_ignored() -> None:
    prefix = PREFIXES["image_encoder"]
    assert list(component_keys([prefix + "visual.proj", prefix + "visual.conv1.weight"], "image_encoder")) == [
        "visual.conv1.weight"
    ]
