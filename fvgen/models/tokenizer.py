"""Token ids of prompts. Those of the two that the model was trained with are known; others need CLIP's vocabulary."""

from __future__ import annotations

import os
from pathlib import Path

from fvgen.utils.errors import UserError

PROMPT = "Rotating view of a scene"
CONTEXT_LENGTH = 77
_START, _END = 49406, 49407
_KNOWN = {PROMPT: (32265, 1093, 539, 320, 3562), "": ()}


def tokenize(prompt: str, vocabulary: str | os.PathLike[str] | None = None) -> list[int]:
    """77 CLIP token ids of a prompt: start, words, end, zeros. A longer one is cut.

    Args:
        prompt: any text.
        vocabulary: folder with the files of CLIP's tokenizer as transformers reads them, ``vocab.json`` and ``merges.txt`` or
            ``tokenizer.json``; the fixed and the empty prompt need none.

    Raises:
        UserError: another prompt without a vocabulary, or with one that is not CLIP's; transformers is not installed.
    """
    ids = [_START, *_KNOWN[prompt], _END] if prompt in _KNOWN else _by_vocabulary(prompt, vocabulary)
    return ids + [0] * (CONTEXT_LENGTH - len(ids))


def _by_vocabulary(prompt: str, vocabulary: str | os.PathLike[str] | None) -> list[int]:
    if vocabulary is None:
        raise UserError(
            f"only the prompt {PROMPT!r} and the empty one can be used without CLIP's vocabulary, which is not included, "
            f"got {prompt!r}; give a folder with its tokenizer's files (--tokenizer)"
        )
    folder = Path(vocabulary)
    if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise UserError(
            f"the folder {folder} has neither vocab.json nor tokenizer.json; give one with the files of CLIP's tokenizer"
        )
    try:
        from transformers import CLIPTokenizer
    except ImportError:
        raise UserError(
            "a prompt of your own needs transformers; install it, for example with `pip install transformers`"
        ) from None
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        ids = [tokenizer(text, truncation=True, max_length=CONTEXT_LENGTH)["input_ids"] for text in (PROMPT, prompt)]
    except Exception as error:  # the library has no one kind for files that do not fit
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer in {folder} cannot be read ({reason}); get its files again") from error
    if list(ids[0]) != [_START, *_KNOWN[PROMPT], _END]:
        raise UserError(
            f"the tokenizer in {folder} is not CLIP's: it reads {PROMPT!r} differently; give the one of OpenCLIP's ViT-H/14"
        )
    return list(ids[1])
