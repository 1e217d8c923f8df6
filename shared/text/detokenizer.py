"""Tokens to text while they arrive, without ever taking back what was shown.

A token may end in the middle of a character; its bytes wait for the rest. Invalid UTF-8 becomes
U+FFFD as soon as no further byte could make it valid. Special tokens show nothing.
"""

from codecs import utf_8_decode
from collections.abc import Callable, Sequence
from typing import Protocol

from shared.text.table import TokenTable

_HELD_TOKENS_MAX = 8  # a character has at most four bytes, a byte token at least one
_CONTEXT_TOKENS = 6  # enough for a decoder to know that it is not at the start of a text
_REPLACEMENT = "�"


class IncrementalDetokenizer(Protocol):
    """One stream of tokens. The pieces joined are the text of the whole."""

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that these tokens made final; it may be empty."""
        ...

    def flush(self) -> str:
        """What is left when no token follows: an unfinished character, as U+FFFD."""
        ...


class TableDetokenizer:
    """For tokenizers with a table: one lookup a token, well below a microsecond."""

    __slots__ = ("_blanks", "_pending", "_table", "_texts")

    def __init__(self, table: TokenTable, after: Sequence[int] = ()) -> None:
        self._table = table.data
        self._texts = table.texts
        self._pending = b""
        self._blanks = 0 if after else table.blanks_stripped

    def feed(self, tokens: Sequence[int]) -> str:
        if len(tokens) == 1 and not self._pending and not self._blanks:
            text = self._texts.get(tokens[0])
            if text is not None:
                return text
        data = self._table
        # An id without an entry is padding of the model's vocabulary: it has no text.
        pending = self._pending + b"".join([data.get(token, b"") for token in tokens])
        text, used = utf_8_decode(pending, "replace", False)
        self._pending = pending[used:]
        return self._strip(text) if self._blanks else text

    def flush(self) -> str:
        text, _ = utf_8_decode(self._pending, "replace", True)
        self._pending = b""
        return self._strip(text) if self._blanks else text

    def _strip(self, text: str) -> str:
        """Drop the blanks that the decoder drops at the start of a text."""
        stripped = text[: self._blanks].lstrip(" ") + text[self._blanks :]
        dropped = len(text) - len(stripped)
        self._blanks = 0 if stripped else self._blanks - dropped
        return stripped


class WindowDetokenizer:
    """For every other tokenizer: decodes a short window of tokens before and after the new ones,
    and shows the difference. The window's first part tells the decoder what came before, since
    some strip the blank at the start of a text or join words differently."""

    def __init__(self, decode: Callable[[Sequence[int]], str], after: Sequence[int] = ()) -> None:
        self._decode = decode
        self._context = list(after[-_CONTEXT_TOKENS:])
        self._context_text = decode(self._context)
        while self._context_text.startswith(_REPLACEMENT):  # cut inside a character
            self._context = self._context[1:]
            self._context_text = decode(self._context)
        self._held: list[int] = []

    def feed(self, tokens: Sequence[int]) -> str:
        return "".join([self._feed_one(token) for token in tokens])

    def flush(self) -> str:
        return self._show(self._decode(self._context + self._held)) if self._held else ""

    def _feed_one(self, token: int) -> str:
        self._held.append(token)
        text = self._decode(self._context + self._held)
        held_enough = len(self._held) >= _HELD_TOKENS_MAX
        if len(text) <= len(self._context_text):
            if held_enough:  # special tokens only: they change nothing
                self._held = []
            return ""
        if text.endswith(_REPLACEMENT) and not held_enough:
            return ""
        return self._show(text)

    def _show(self, text: str) -> str:
        """The new part of ``text``. What was held becomes the context: it starts where a
        character starts."""
        shown = text[len(self._context_text) :]
        self._context, self._held = self._held, []
        self._context_text = self._decode(self._context)
        return shown
