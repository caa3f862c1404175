"""Text from token ids that come one at a time: whole characters only, and up to a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxdecode.errors import RequestError

Decode = Callable[[list[int]], str]

_REPLACEMENT = "\ufffd"
# Bytes of an unfinished UTF-8 character: at most 3, each shown as U+FFFD by some decoders.
_MAX_UNFINISHED = 3
# Tokens decoded again with every new one. 8 hold a character before the unfinished one, for any
# tokenizer, since every visible token has at least one byte; cutting at 16 makes cuts rare.
_KEEP_TOKENS = 8
_CUT_TOKENS = 16
_FORCED_CUT_TOKENS = 32
_PROMPT_TOKENS = 64


class TextStream:
    """Turns sampled ids into text that may be shown at once, and finds stop strings.

    `push` gives out text as soon as no later token can change it: never half of a character, never
    the beginning of what may become a stop string. All pushes and `finish` together give
    `decode(all ids)`, cut before the first stop string: the one that is complete first, whatever
    the tokens; among those complete at the same character, the longest. Each push decodes a few
    tokens, however long the text is.

    Args:
      decode: token ids -> text. Later ids must not change the text of earlier ones, apart from a
        blank stripped at the very start and U+FFFD for an unfinished character at the end.
      stop: a stop string, or several; none may be empty (RequestError).
      prompt_ids: ids before the first pushed one. Without them the text begins as
        `decode(ids)` does, so a SentencePiece decoder drops a leading blank; with them the text is
        what the ids add to the prompt's text.

    Attributes:
      num_tokens: ids pushed so far.
      stop_tokens: `num_tokens` when the stop string was found; None before.
      stop_string: the stop string found, or None.
    """

    def __init__(
        self, decode: Decode, stop: str | Sequence[str] = (), prompt_ids: Sequence[int] = ()
    ):
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in self._stop:
            raise RequestError(f"a stop string must not be empty, found stop={self._stop!r:.100}")
        self._detokenizer = _Detokenizer(decode, prompt_ids)
        self._held = ""
        self._pieces: list[str] = []
        self._finished = False
        self.num_tokens = 0
        self.stop_tokens: int | None = None
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """True once a stop string was found."""
        return self.stop_string is not None

    @property
    def text(self) -> str:
        """All text given out so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token_id: int) -> str:
        """The text that this token makes certain; often "", sometimes more than the token's own.

        Raises RuntimeError after a stop string or after `finish`.
        """
        if self._finished or self.stopped:
            end = "a stop string" if self.stopped else "finish()"
            raise RuntimeError(f"this text ended with {end}; make a new TextStream")
        self.num_tokens += 1
        return self._give(self._detokenizer.push(token_id), last=False)

    def finish(self) -> str:
        """The text held back, an unfinished character as U+FFFD; "" if called again."""
        if self._finished or self.stopped:
            return ""
        self._finished = True
        return self._give(self._detokenizer.finish(), last=True)

    def _give(self, new: str, last: bool) -> str:
        text = self._held + new
        found = find_stop(text, self._stop) if new else None
        if found is not None:
            start, self.stop_string = found
            self.stop_tokens = self.num_tokens
            text, self._held = text[:start], ""
        else:
            hold = 0 if last else _stop_prefix_length(text, self._stop)
            text, self._held = text[: len(text) - hold], text[len(text) - hold :]
        self._pieces.append(text)
        return text


def find_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
    """(start, stop string) of the first stop string in `text`, or None.

    The first is the one that ends first, so that the answer is the same for text that comes in
    pieces; of those that end together, the longest.
    """
    found = [(text.find(s), s) for s in stop]
    ends = [(start + len(s), start, s) for start, s in found if start >= 0]
    return min(ends)[1:] if ends else None


def _stop_prefix_length(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(s) for s in stop), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[len(text) - length :]
        if any(s.startswith(end) for s in stop):
            return length
    return 0


class _Detokenizer:
    """Ids to text that later ids cannot change, decoding a window of the last few tokens.

    `_given` is the part of the window's text that is certain. Cutting the window's start may turn
    its first characters into others (half a character, a stripped blank) but not its last ones,
    because UTF-8 finds its way back within one character; so only the length of what is not yet
    given out is carried over a cut.
    """

    def __init__(self, decode: Decode, prompt_ids: Sequence[int]):
        self._decode = decode
        recent = [int(token_id) for token_id in prompt_ids[-_PROMPT_TOKENS:]]
        self._window = [token_id for token_id in recent if not self._is_invisible(token_id)]
        self._window = self._window[-_CUT_TOKENS:]
        self._text = decode(self._window) if self._window else ""
        self._given = self._text[: _certain_length(self._text)]

    def push(self, token_id: int) -> str:
        window = [*self._window, token_id]
        text = self._decode(window)
        if text == self._text and self._is_invisible(token_id):
            return ""
        new = ""
        # Else the decoder takes back a run of byte tokens until its last character is whole.
        if text.startswith(self._given) or not text.endswith(_REPLACEMENT):
            certain = max(_certain_length(text), len(self._given))
            new = text[len(self._given) : certain]
            self._given = text[:certain]
        self._window, self._text = window, text
        self._cut()
        return new

    def finish(self) -> str:
        new = self._text[len(self._given) :]
        self._given = self._text
        return new

    def _is_invisible(self, token_id: int) -> bool:
        # Twice: alone, a blank at the start of a text is stripped by some decoders.
        return self._decode([token_id, token_id]) == ""

    def _cut(self) -> None:
        if len(self._window) < _CUT_TOKENS:
            return
        if self._given == self._text:
            for keep in range(_KEEP_TOKENS, _KEEP_TOKENS + 4):
                text = self._decode(self._window[-keep:])
                if text and self._text.endswith(text):
                    self._window, self._text, self._given = self._window[-keep:], text, text
                    return
        if len(self._window) >= _FORCED_CUT_TOKENS:
            pending = len(self._text) - len(self._given)
            self._window = self._window[-_KEEP_TOKENS:]
            self._text = self._decode(self._window)
            self._given = self._text[: max(0, len(self._text) - pending)]


def _certain_length(text: str) -> int:
    """Length of `text` without the U+FFFD at its end that may still become a character."""
    unfinished = len(text) - len(text.rstrip(_REPLACEMENT))
    return len(text) - min(unfinished, _MAX_UNFINISHED)
