"""The contract between a pure core and whatever drives it: events in, effects out.

A core is synchronous and deterministic: same state, event and time give the same effects. The
runtime performs them in production, the simulator in virtual time. The set is closed: a core
that needs something else needs a new effect here, and both drivers must learn it.
"""

from typing import Any, Protocol

import msgspec

from shared.messages.base import DataMessage, Message


class Publish(msgspec.Struct, frozen=True):
    subject: str
    message: Message | DataMessage


class Reply(msgspec.Struct, frozen=True):
    """Answer to a Query. ``to`` is opaque to the core."""

    to: str
    message: Message


class Ask(msgspec.Struct, frozen=True):
    """A question; the answer comes as an ordinary message on the subject ``reply_to``."""

    subject: str
    message: Message
    reply_to: str


class SetTimer(msgspec.Struct, frozen=True):
    """Deliver ``event`` back to this core at ``at_s``. Timers are never cancelled: a core
    ignores one that no longer fits its state."""

    at_s: float
    event: Message


class Store(msgspec.Struct, frozen=True):
    """Write ``message`` under ``key`` in the state bucket iff its revision is still ``revision``
    (0: the key must not exist). Comes back as Stored or StoreConflict."""

    key: str
    message: Message
    revision: int


class Load(msgspec.Struct, frozen=True):
    """Read ``key``. Comes back as Loaded; until then the driver retries, the core waits."""

    key: str
    as_type: type[Message]


class Start(msgspec.Struct, frozen=True):
    """Do slow work outside the core; the service's adapter for ``job`` performs it and hands its
    outcome back as an event."""

    job: str
    argument: Any


class Log(msgspec.Struct, frozen=True):
    """Say this in the log: the name of the event, and its fields. How a core explains itself."""

    event: str
    fields: dict[str, Any]
    level: str = "info"


Effect = Publish | Reply | Ask | SetTimer | Store | Load | Start | Log


class Query(msgspec.Struct, frozen=True):
    """A question that wants a Reply."""

    message: Message
    reply_to: str


class Started(Message, frozen=True, kw_only=True):
    """First event of every core's life."""


class Loaded(Message, frozen=True, kw_only=True):
    """``message`` is None when the key holds nothing."""

    key: str
    message: Any = None
    revision: int = 0


class Stored(Message, frozen=True, kw_only=True):
    key: str
    revision: int


class StoreConflict(Message, frozen=True, kw_only=True):
    """Somebody else wrote ``key`` first: load it again before deciding anything."""

    key: str


class Draining(Message, frozen=True, kw_only=True):
    """The process was told to end: admit nothing more, settle what is open."""


class Core(Protocol):
    def step(self, event: Any, now_s: float) -> list[Effect]:  # noqa: ANN401  # each core has its union
        """Never awaits, never raises on what comes from outside; a list, so that it is done."""
        ...

    def check(self) -> None:
        """Assert the invariants: after every step in simulation, when idle in production."""
        ...
