"""The clients' side of journeys: who is shown which tokens.

A batch of chunks is shared by many requests, and a fault in writing one answer must cost only that
one. So everything that a choice may raise ends here, as the failure of its own request.
"""

import logging
from typing import Protocol

from services.ingress.events import RequestFailed
from services.ingress.journey import Taken
from shared.messages.requests import FinishReason

log = logging.getLogger("oserve.ingress")


class Choice(Protocol):
    """Whoever shows one journey's tokens to a client."""

    def on_tokens(self, taken: Taken) -> bool:
        """Show them; True if a stop string ended the text: nothing more is wanted."""
        ...

    def on_end(self, finish: FinishReason) -> None: ...
    def on_fail(self, failure: RequestFailed) -> None: ...


class Choices:
    """One per journey from its opening to its end."""

    def __init__(self) -> None:
        self._choices: dict[str, Choice] = {}

    def __len__(self) -> int:
        return len(self._choices)

    def open(self, request_id: str, choice: Choice) -> None:
        self._choices[request_id] = choice

    def forget(self, request_id: str) -> None:
        self._choices.pop(request_id, None)

    def show(self, request_id: str, taken: Taken) -> FinishReason | None:
        """How it ended, if it did: by a stop string, or because it could not be written."""
        choice = self._choices[request_id]
        try:
            return "stop" if choice.on_tokens(taken) else None
        except Exception:
            log.exception("choice.broken", extra={"request_id": request_id})
            return "failed"

    def end(self, request_id: str, finish: FinishReason) -> None:
        """Idempotent."""
        choice = self._choices.pop(request_id, None)
        if choice is None:
            return
        if finish != "failed":
            try:
                choice.on_end(finish)
            except Exception:
                log.exception("choice.broken", extra={"request_id": request_id})
            else:
                return
        detail = "The ingress failed to write the answer; its log has the cause."
        choice.on_fail(RequestFailed(request_id, "engine", detail, 0.0))

    def fail(self, failure: RequestFailed) -> None:
        """Idempotent."""
        choice = self._choices.pop(failure.request_id, None)
        if choice is not None:
            choice.on_fail(failure)
