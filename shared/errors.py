"""The errors of the mesh. Class decides what the caller may do; nobody parses a text.

OServeError
├── ConfigInvalid      the operator must change a setting; names field, value, remedy
│   └── ProfileInvalid (shared.cost.files) a profile file is wrong; names file and line, too
├── Rejected           the caller must change the request, or wait; has a FailureCode
├── Transient          the same call may work later
│   ├── BusUnavailable
│   └── DeadlineExceeded
├── PayloadTooLarge    the message exceeds the broker's cap
└── EngineFailed       the replica is lost
"""

from typing import Any


class OServeError(Exception):
    """Base of every error that the mesh raises on purpose."""


class ConfigInvalid(OServeError):
    """A setting is wrong; ``remedy`` says what to write instead."""

    def __init__(self, *, field: str, value: Any, remedy: str) -> None:  # noqa: ANN401  # any setting
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field} = {value!r}: {remedy}")


class Rejected(OServeError):
    """The request is refused as it stands; ``code`` is a shared.messages FailureCode."""

    def __init__(self, code: str, detail: str, *, retry_after_s: float = 0.0) -> None:
        self.code, self.detail, self.retry_after_s = code, detail, retry_after_s
        super().__init__(f"{code}: {detail}")


class Transient(OServeError):
    """The same call may succeed later."""


class BusUnavailable(Transient):
    """The broker cannot be reached, or refused the operation."""


class DeadlineExceeded(Transient):
    """No answer within the time allowed."""


class PayloadTooLarge(OServeError):
    """A message exceeds the broker's max_payload."""

    def __init__(self, *, subject: str, size_bytes: int, limit_bytes: int) -> None:
        self.subject, self.size_bytes, self.limit_bytes = subject, size_bytes, limit_bytes
        super().__init__(
            f"message of {size_bytes} bytes for {subject} exceeds the broker's max_payload of "
            f"{limit_bytes} bytes: raise max_payload in deploy/nats.conf or send less"
        )


class EngineFailed(OServeError):
    """The engine cannot go on; its replica is lost."""


class PeerLost(OServeError):
    """Another worker that was asked for weights, KV cache or requests is gone, or silent."""
