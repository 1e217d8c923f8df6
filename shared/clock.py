"""Time and identity, so that a simulation can hold both still."""

import time
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Monotonic seconds; comparable only within one process."""
        ...

    def unix_s(self) -> float:
        """Seconds since 1970, for what leaves the process."""
        ...


class SystemClock:
    def now_s(self) -> float:
        return time.monotonic()

    def unix_s(self) -> float:
        return time.time()


class ManualClock:
    """A clock that moves only when told to: for tests and simulation."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.time_s = now_s

    def now_s(self) -> float:
        return self.time_s

    def unix_s(self) -> float:
        return self.time_s
