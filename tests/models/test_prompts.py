"""Prompts other than the stored one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fvgen.diffusion.convert import convert_checkpoint
from fvgen.models.bundle import ModelBundle
from fvgen.models.prompts import check_prompt, embed_prompt
from fvgen.models.tokenizer import CONTEXT_LENGTH, PROMPT, tokenize
from fvgen.pipeline import FVGenPipeline
from fvgen.utils.errors import UserError
from tests.reference_checkpoints import viewcrafter_spec, viewcrafter_state, write_viewcrafter

CAT, IDS = "A photo of a cat, 3D!", [49406, 320, 1125, 539, 320, 2368, 267, 274, 323, 256, 49407]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model.ckpt"
    write_viewcrafter(path, viewcrafter_state(viewcrafter_spec("tiny"), None, torch.float16))
    return path


@pytest.fixture(scope="module")
def model(source: Path) -> Path:
    """A converted model with its text tower."""
    folder = source.parent / "model"
    convert_checkpoint(source, viewcrafter_spec("tiny"), keep_text_tower=True).save_pretrained(folder)
    return folder


@pytest.fixture
def vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that a stand-in for transformers reads as CLIP's vocabulary."""

    def from_pretrained(folder: Path, local_files_only: bool) -> object:
        known = json.loads((folder / "vocab.json").read_text())
        assert local_files_only
        return lambda text, truncation, max_length: {"input_ids": known[text][:max_length]}

    stand_in = SimpleNamespace(CLIPTokenizer=SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setitem(sys.modules, "transformers", stand_in)
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({PROMPT: [i for i in tokenize(PROMPT) if i], CAT: IDS}))
    return folder


def test_the_stored_prompts_are_the_towers(model: Path) -> None:
    bundle = ModelBundle.from_pretrained(model, verify=True)
    assert bundle.text_encoder is None
    for prompt, tokens in ((PROMPT, bundle.prompt), ("", bundle.empty)):
        assert torch.equal(embed_prompt(model, prompt), tokens)
    assert not torch.equal(bundle.prompt, bundle.empty)


def test_another_prompt(model: Path, vocabulary: Path) -> None:
    assert tokenize(CAT, vocabulary) == IDS + [0] * (CONTEXT_LENGTH - len(IDS))
    tokens = embed_prompt(model, CAT, vocabulary)
    pipe = FVGenPipeline.from_pretrained(model, "cpu", prompt=CAT, tokenizer=vocabulary)
    assert torch.equal(pipe.bundle.prompt, tokens)
    stored = ModelBundle.from_pretrained(model)
    assert torch.equal(tokens[0], stored.prompt[0])  # the start sees nothing else
    assert not torch.allclose(tokens[1], stored.prompt[1])
    assert torch.equal(FVGenPipeline.from_pretrained(model, "cpu", prompt=PROMPT).bundle.prompt, stored.prompt)
    assert torch.equal(FVGenPipeline.from_pretrained(model, "cpu", prompt="").bundle.prompt, stored.empty)


def test_what_is_lacking_is_said(
    source: Path, model: Path, vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(source, viewcrafter_spec("tiny")).save_pretrained(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    for words, call in {
        "has no text tower.*--keep-text-tower": (tmp_path / "bare", CAT, vocabulary),
        "give a folder with its tokenizer's files": (model, CAT, None),
        "neither vocab.json nor tokenizer.json": (model, CAT, tmp_path / "empty"),
        "only for a prompt of your own": (model, None, vocabulary),
        "cannot be read": (model, "not in the stand-in", vocabulary),
    }.items():
        with pytest.raises(UserError, match=words):
            check_prompt(*call)
    (vocabulary / "vocab.json").write_text(json.dumps({PROMPT: [1, 2], CAT: IDS}))
    with pytest.raises(UserError, match="is not CLIP's"):
        check_prompt(model, CAT, vocabulary)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install transformers"):
        check_prompt(model, CAT, vocabulary)


def test_a_damaged_tower(model: Path, source: Path, vocabulary: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, viewcrafter_spec("tiny"), keep_text_tower=True).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "text_encoder" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"the text tower in .* cannot be loaded"):
        embed_prompt(tmp_path / "model", CAT, vocabulary)
    with pytest.raises(UserError, match="differs from its checksum"):
        ModelBundle.from_pretrained(tmp_path / "model", verify=True)
    ModelBundle.from_pretrained(tmp_path / "model")
    file.unlink()
    with pytest.raises(UserError, match="incomplete"):
        ModelBundle.from_pretrained(tmp_path / "model")


def test_transformers_itself_refuses_another_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed: pip install fvgen[prompt]")
    words = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="is not CLIP's"):
        tokenize(CAT, tmp_path)
