"""How often a command that is not yet answered is sent again."""

from collections.abc import Iterable

from services.switcher.commands import Command, part_of, publish, step_of
from services.switcher.config import SwitcherConfig
from services.switcher.view import Part
from shared.core import Publish

DOUBLINGS_MAX = 16  # keeps the power small; repair_retry_s_max rules long before


class Pacing:
    """Remembers when each command was sent last, so that asking often costs nothing."""

    def __init__(self, config: SwitcherConfig) -> None:
        self._retry_s, self._retry_s_max = config.command_retry_s, config.repair_retry_s_max
        self._sent: dict[tuple[str, Part, int, int], float] = {}

    def clear(self) -> None:
        self._sent.clear()

    def due(
        self, commands: Iterable[Command], failures: dict[Part, int], now_s: float
    ) -> Iterable[Publish]:
        """Those not sent within their retry time; a part that keeps failing waits twice as long
        each time, so that a replica that cannot start does not spin."""
        for command in commands:
            part = part_of(command)
            doublings = min(failures.get(part, 0), DOUBLINGS_MAX)
            retry_s = min(self._retry_s * 2**doublings, self._retry_s_max)
            key = (type(command).__name__, part, command.epoch, step_of(command))
            if now_s - self._sent.get(key, float("-inf")) >= retry_s:
                self._sent[key] = now_s
                yield publish(command)

    def prune(self, now_s: float) -> None:
        """Forget what could be sent again anyway."""
        self._sent = {k: s for k, s in self._sent.items() if now_s - s < self._retry_s_max}
