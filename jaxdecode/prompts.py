"""Prompts of any accepted form, to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdecode.errors import RequestError


def encode_prompts(
    tokenizer: Any, prompts: Any, vocab_size: int, filled: Sequence[int] = ()
) -> list[list[int]]:
    """Token ids of one prompt or of a list of prompts.

    Args:
      tokenizer: None when all prompts are ids.
      prompts: a str, a list of {"role", "content"}, a list of ids, or a list of such prompts.
      vocab_size: ids must lie below it.
      filled: tokens that the cache already holds, per prompt; a text or conversation that continues
        gets no second beginning-of-sequence token. Token ids are taken as they are.

    Raises:
      RequestError: nothing to encode, a form not known, or ids outside the vocabulary.
    """
    batch = [prompts] if _is_single(prompts) else list(prompts)
    if not batch:
        raise RequestError("prompts is empty; give at least one prompt")
    encoded = []
    for i, prompt in enumerate(batch):
        ids = _encode(tokenizer, prompt, i)
        continues = i < len(filled) and filled[i] > 0 and not _is_ids(prompt)
        if continues and ids[:1] == [getattr(tokenizer, "bos_id", None)]:
            ids = ids[1:]
        _check_ids(ids, vocab_size, i)
        encoded.append(ids)
    return encoded


def _is_single(prompts: Any) -> bool:
    if isinstance(prompts, str):
        return True
    if not _is_list(prompts):
        raise RequestError(
            "a prompt is a str, a list of {'role', 'content'} or a list of token ids; "
            f"found {type(prompts).__name__}"
        )
    if isinstance(prompts, np.ndarray):
        return prompts.ndim == 1
    return len(prompts) > 0 and all(_is_id(x) or isinstance(x, dict) for x in prompts)


def _encode(tokenizer: Any, prompt: Any, i: int) -> list[int]:
    if isinstance(prompt, str):
        _need(tokenizer, i, "a str")
        return [int(x) for x in tokenizer.encode(prompt)]
    if _is_ids(prompt):
        return [int(x) for x in prompt]
    if _is_list(prompt) and all(isinstance(x, dict) for x in prompt):
        _need(tokenizer, i, "a conversation")
        if not hasattr(tokenizer, "apply_chat_template"):
            raise RequestError(
                f"prompt {i} is a conversation, and this tokenizer has no apply_chat_template; "
                "give it as a str or as token ids"
            )
        return [int(x) for x in tokenizer.apply_chat_template(list(prompt))]
    raise RequestError(
        f"prompt {i} must be a str, a list of {{'role', 'content'}} or a list of token ids, "
        f"found {type(prompt).__name__}"
    )


def _need(tokenizer: Any, i: int, form: str) -> None:
    if tokenizer is None:
        raise RequestError(
            f"prompt {i} is {form}, which needs a tokenizer; give token ids without one"
        )


def _check_ids(ids: list[int], vocab_size: int, i: int) -> None:
    if not ids:
        raise RequestError(f"prompt {i} has no tokens; give at least one")
    # Checked here because a gather on the device would clamp silently.
    outside = [x for x in ids if not 0 <= x < vocab_size]
    if outside:
        raise RequestError(
            f"prompt {i} has token id {outside[0]}, outside the model's vocabulary of "
            f"{vocab_size}; the tokenizer and the model do not belong together"
        )


def _is_list(x: Any) -> bool:
    if isinstance(x, np.ndarray):
        return x.ndim > 0
    # Bytes are sequences of integers too, but hardly meant as token ids.
    return isinstance(x, Sequence) and not isinstance(x, (str, bytes, bytearray, memoryview))


def _is_ids(prompt: Any) -> bool:
    return _is_list(prompt) and all(_is_id(x) for x in prompt)


def _is_id(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)
