"""The state bucket in memory, with the compare-and-set of a JetStream KV bucket."""

from dataclasses import dataclass

from shared.messages.base import Message


@dataclass(frozen=True, slots=True)
class Write:
    """One write that took place: what a history of the bucket is made of."""

    key: str
    writer: str
    message: Message
    revision: int


class Bucket:
    def __init__(self) -> None:
        self.history: list[Write] = []
        self.checks_revision = True  # a test turns it off to prove that somebody would notice
        self._newest: dict[str, Write] = {}

    def load(self, key: str) -> tuple[Message | None, int]:
        newest = self._newest.get(key)
        return (None, 0) if newest is None else (newest.message, newest.revision)

    def store(self, writer: str, key: str, message: Message, revision: int) -> int | None:
        """The new revision; None if the key's is no longer ``revision``. A repeat of what the
        key holds counts as that write, as it does in the runtime."""
        value, current = self.load(key)
        if revision != current and self.checks_revision:
            return current if value == message else None
        write = Write(key, writer, message, len(self.history) + 1)
        self.history.append(write)
        self._newest[key] = write
        return write.revision
