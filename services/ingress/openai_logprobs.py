"""Log probabilities in the two shapes that OpenAI's endpoints give them."""

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from shared.messages.requests import TokenLogprobs
from shared.text import Tokenizer

_LOGPROB_MIN = -9999.0
"""JSON has no minus infinity; this is what OpenAI sends for it."""

_json = msgspec.json.Encoder().encode


class LogprobsFormat:
    """One choice's log probabilities, chunk by chunk, each encoded to JSON.

    Give it every token of the choice in order: the offset of a token in the text depends on all
    before it.
    """

    def __init__(self, kind: Literal["completion", "chat"], tokenizer: Tokenizer) -> None:
        self._kind = kind
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer()
        self._offset = 0

    def encode(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> bytes:
        """``logprobs[i]`` belongs to ``tokens[i]``."""
        if self._kind == "chat":
            return _json({"content": self._chat(tokens, logprobs), "refusal": None})
        return _json(self._completion(tokens, logprobs))

    def _completion(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, object]:
        names = self._tokenizer.token_text
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.feed((token,)))
        return {
            "tokens": [names(token) for token in tokens],
            "token_logprobs": [_finite(entry.logprob) for entry in logprobs],
            "top_logprobs": [
                {names(top): _finite(value) for top, value in _top(entry)} for entry in logprobs
            ],
            "text_offset": offsets,
        }

    def _chat(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> list[dict[str, object]]:
        return [
            self._entry(token, entry.logprob)
            | {"top_logprobs": [self._entry(top, value) for top, value in _top(entry)]}
            for token, entry in zip(tokens, logprobs, strict=True)
        ]

    def _entry(self, token: int, logprob: float) -> dict[str, object]:
        return {
            "token": self._tokenizer.token_text(token),
            "logprob": _finite(logprob),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }


def _top(entry: TokenLogprobs) -> Iterator[tuple[int, float]]:
    return zip(entry.top_tokens, entry.top_logprobs, strict=True)


def _finite(logprob: float) -> float:
    """NaN, too, becomes the least: neither can be written in JSON."""
    return max(_LOGPROB_MIN, logprob)  # max keeps its first argument against NaN
