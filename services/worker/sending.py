"""What a step made, on its way to the ingresses that asked for it."""

from collections.abc import Sequence

from services.worker.attempts import Attempt
from services.worker.engine.interface import EngineChunk
from services.worker.events import EndedAttempt, RequestsEnded
from services.worker.host_context import HostContext
from shared.messages.requests import TokenChunk


class Sender:
    """``live``: the host's attempts by their engine's keys; those that end are taken out."""

    def __init__(self, replica_id: str, context: HostContext, live: dict[str, Attempt]) -> None:
        self._replica_id, self._live = replica_id, live
        self._outbox, self._feed = context.outbox, context.feed
        self.output_tokens_total = 0

    async def send(self, chunks: Sequence[EngineChunk]) -> None:
        ended: list[EndedAttempt] = []
        for chunk in chunks:
            attempt = self._live.get(chunk.key)
            if attempt is None:
                continue  # aborted since
            self.output_tokens_total += len(chunk.tokens)
            self._outbox.batch(attempt.subject, self._replica_id).append(
                TokenChunk(
                    request_id=attempt.request_id,
                    attempt=attempt.attempt,
                    position=chunk.position,
                    tokens=chunk.tokens,
                    finish=chunk.finish,
                    failure="engine" if chunk.finish == "failed" else None,
                    detail=chunk.detail,
                    logprobs=chunk.logprobs,
                )
            )
            if chunk.finish is not None:
                del self._live[chunk.key]
                ended.append(EndedAttempt(request_id=attempt.request_id, attempt=attempt.attempt))
        await self._outbox.flush()
        if ended:
            self._feed(RequestsEnded(ended=tuple(ended)))
