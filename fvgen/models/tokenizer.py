"""Token ids of the two prompts the model uses."""

from __future__ import annotations

from fvgen.utils.errors import UserError

PROMPT = "Rotating view of a scene"
CONTEXT_LENGTH = 77
_START, _END = 49406, 49407
_KNOWN = {PROMPT: (32265, 1093, 539, 320, 3562), "": ()}


def tokenize(prompt: str) -> list[int]:
    """77 CLIP token ids of the fixed or the empty prompt: start, words, end, zeros.

    Raises:
        UserError: any other prompt, for which the CLIP vocabulary would be needed.
    """
    if prompt not in _KNOWN:
        raise UserError(
            f"only the fixed prompt {PROMPT!r} and the empty prompt can be tokenised because no CLIP vocabulary is included, "
            f"got {prompt!r}; use the fixed prompt, with which the model was trained"
        )
    ids = [_START, *_KNOWN[prompt], _END]
    return ids + [0] * (CONTEXT_LENGTH - len(ids))
