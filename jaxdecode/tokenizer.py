"""Text to token ids and back: `Tokenizer`, one class for every model format.

The work is done by the `tokenizers` library. What is added here: the checks (a damaged file, an id
that the model or the vocabulary does not have), the end-of-text ids, and the chat template.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from jaxdecode.errors import RequestError, TokenizerError

_BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
_UNDECODABLE = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of a bad byte


class Tokenizer:
    """A `tokenizers.Tokenizer` with its special ids and its chat template.

    Attributes:
      backend: the `tokenizers.Tokenizer` that does the work. Treat it as read-only.
      bos_id: id of the beginning-of-text token, or None. `encode` adds it for models that want it.
      eos_ids: ids that end a text; the first is the tokenizer's eos token. May be empty.
      vocab_size: one more than the largest id.
      chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ):
        # Left by whoever trained the tokenizer; they would cut or pad prompts without a word.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.chat_template = chat_template
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._byte_of_id = _byte_fallback_ids(backend)
        for name, ids in (("bos_id", () if bos_id is None else (bos_id,)), ("eos_ids", eos_ids)):
            for token_id in ids:
                if backend.id_to_token(token_id) is None:
                    raise TokenizerError(f"{name} {token_id} is no token of this vocabulary")

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Tokenizer | None:
        """The tokenizer of a Hugging Face model directory; None if it holds no tokenizer file.

        Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and
        chat_template.jinja. Raises TokenizerError for damaged files, and where there is only a
        tokenizer of another kind (SentencePiece, vocab.json with merges.txt).
        """
        from jaxdecode.hf_tokenizer import read_directory

        return read_directory(Path(path))

    @classmethod
    def from_gguf_metadata(cls, meta: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that a GGUF file's metadata describes (plain Python values by GGUF key).

        Raises TokenizerError for metadata that is damaged or of a kind not known here.
        """
        from jaxdecode.gguf_tokenizer import read_metadata

        return read_metadata(meta)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with BOS or what else the model's own post-processor adds.

        As everywhere with this library, the names of special tokens inside `text` become those
        tokens: "<|im_end|>" written by a user ends the turn. Filter untrusted text before.
        """
        if not isinstance(text, str):
            raise RequestError(f"text to encode must be a str, found {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text to encode holds half of a surrogate pair at character {error.start}, which "
                "is no valid Unicode; decode the input as UTF-8 first"
            ) from None
        with library_errors("the tokenizer cannot encode this text"):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the token ids; special tokens are left out.

        Bytes that form no UTF-8 character become U+FFFD. Every character depends on its own bytes
        only, so decoding more ids never changes the text before an unfinished last character.
        Raises RequestError for an id outside 0 <= id < vocab_size.
        """
        ids = [int(token_id) for token_id in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise RequestError(
                f"token id {bad} is not in the tokenizer's vocabulary of {self.vocab_size} tokens "
                "(0 <= id < vocab_size); are the tokenizer and the model of the same kind?"
            )
        with library_errors("the tokenizer cannot decode these ids"):
            if self._byte_of_id.keys().isdisjoint(ids):
                return self.backend.decode(ids, skip_special_tokens=True)
            return self.backend.decoder.decode(self._tokens_with_joined_bytes(ids))

    def _tokens_with_joined_bytes(self, ids: list[int]) -> list[str]:
        # The library's byte fallback gives up a whole run of byte tokens for one bad byte, so text
        # already shown could change. SentencePiece judges each character by itself, and so do we.
        tokens: list[str] = []
        run = bytearray()
        for token_id in [*(i for i in ids if i not in self._special_ids), None]:
            byte = None if token_id is None else self._byte_of_id.get(token_id)
            if byte is not None:
                run.append(byte)
                continue
            text = run.decode("utf-8", errors="surrogateescape")
            # One by one: a token that reads "<0x41>" would be taken for a byte again.
            tokens.extend(_UNDECODABLE.sub("\ufffd", text))
            run.clear()
            if token_id is not None:
                tokens.append(self.backend.id_to_token(token_id) or "")
        return tokens

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, written as the model's chat template writes it.

        Args:
          messages: [{"role": ..., "content": ...}, ...], both strings.
          add_generation_prompt: end with the opening of the assistant's answer.

        The template itself writes BOS where the model wants one; there is never a second.
        Raises ChatTemplateError (no template, or it fails) and RequestError (bad messages).
        """
        from jaxdecode.chat_template import render_chat_template

        text = render_chat_template(
            self.chat_template,
            messages,
            bos_token=None if self.bos_id is None else self.backend.id_to_token(self.bos_id),
            eos_token=self.backend.id_to_token(self.eos_ids[0]) if self.eos_ids else None,
            add_generation_prompt=add_generation_prompt,
        )
        ids = self.encode(text, add_special_tokens=False)
        while self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id]:
            del ids[0]
        return ids

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `from_directory` reads back.

        Each file appears whole or not at all. Raises TokenizerError if it cannot be written.
        """
        from jaxdecode.hf_tokenizer import write_directory

        write_directory(self, Path(directory))


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns whatever the tokenizers library raises into TokenizerError("{what}: ...")."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  it raises bare Exception
        raise TokenizerError(f"{what}: {error}") from None
    except BaseException as error:
        # A panic of its Rust code, which damaged files can cause; the class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {error}") from None


def set_affixes(
    backend: tokenizers.Tokenizer, *, bos_id: int | None = None, eos_id: int | None = None
) -> None:
    """Makes `encode` put BOS before, and EOS behind, every text (None: not)."""
    pieces = [("BOS", bos_id), ("$A", None), ("EOS", eos_id)]
    template = [name for name, token_id in pieces if name == "$A" or token_id is not None]
    backend.post_processor = processors.TemplateProcessing(
        single=template,
        pair=[*template, "$B:1"],
        special_tokens=[
            {"id": name, "ids": [token_id], "tokens": [backend.id_to_token(token_id)]}
            for name, token_id in pieces
            if token_id is not None
        ],
    )


def _byte_fallback_ids(backend: tokenizers.Tokenizer) -> dict[int, int]:
    """Byte value by token id, for decoders that turn the token "<0x41>" into "A"; else empty."""
    if backend.decoder is None or backend.decoder.decode(["<0x41>"]) != "A":
        return {}
    ids = {backend.token_to_id(token): byte for byte, token in enumerate(_BYTE_TOKENS)}
    return {token_id: byte for token_id, byte in ids.items() if token_id is not None}
