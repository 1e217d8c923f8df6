"""When a request ends: an end token, a stop string, or its length."""

from services.worker.engine.interface import EngineRequest
from shared.messages.requests import FinishReason
from shared.text import StopMatcher, Tokenizer


class StopCheck:
    """Watches one request's output tokens, those of earlier attempts included."""

    __slots__ = ("_count", "_detokenizer", "_eos_ids", "_matcher", "_tokens_max")

    def __init__(self, request: EngineRequest, tokenizer: Tokenizer) -> None:
        sampling = request.sampling
        self._eos_ids = frozenset[int]() if sampling.ignore_eos else tokenizer.eos_ids
        self._tokens_max = sampling.output_tokens_max
        self._count = 0
        self._matcher = StopMatcher(sampling.stop) if sampling.stop else None
        # Made as the ingress makes its own: both must find the same end.
        self._detokenizer = tokenizer.detokenizer() if sampling.stop else None

    def feed(self, token: int) -> FinishReason | None:
        """Why the request ends with this token, if it does."""
        self._count += 1
        if token in self._eos_ids:
            return "stop"
        if self._matcher is not None and self._detokenizer is not None:
            _, stopped = self._matcher.feed(self._detokenizer.feed((token,)))
            if stopped:
                return "stop"
        return "length" if self._count >= self._tokens_max else None

    def feed_earlier(self, tokens: list[int]) -> FinishReason | None:
        """The same for the output of earlier attempts: its end may have been lost on the way."""
        finish: FinishReason | None = None
        for token in tokens:
            finish = self.feed(token)
            if finish is not None:
                break
        return finish
