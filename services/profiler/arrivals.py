"""When requests arrived, of which only the end is heard: windows that are told late, but right.

Counted by when they end, a burst looks no higher than what the replicas can serve, and as long as
it takes them to work it off. So each request is put back into the window in which it arrived, and a
window is told when ``settle_windows`` more have passed: by then nearly all its requests have ended.
What ends even later counts in the oldest window kept.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from shared.messages.demand import TypeArrivals


@dataclass(slots=True)
class _Arrived:
    start_s: float
    counts: Counter[int] = field(default_factory=Counter[int])


class Arrivals:
    """One model's last ``settle_windows`` windows, and the present one. Times are the core's."""

    def __init__(self, *, settle_windows: int, start_s: float) -> None:
        self._settle_windows = settle_windows
        self._windows = deque([_Arrived(start_s)])  # the oldest first

    def __len__(self) -> int:
        return len(self._windows)

    def add(self, number: int, *, arrived_s: float) -> None:
        """Count a request of type ``number``. Nearly all belong to one of the newest windows."""
        for window in reversed(self._windows):
            if window.start_s <= arrived_s:
                window.counts[number] += 1
                return
        self._windows[0].counts[number] += 1

    def merge(self, number: int, into: int) -> None:
        """What was type ``number`` is part of ``into`` from now on."""
        for window in self._windows:
            window.counts[into] += window.counts.pop(number, 0)

    def forget(self, numbers: list[int]) -> None:
        """Types whose numbers were given back: a new type may have them next."""
        for window in self._windows:
            for number in numbers:
                window.counts.pop(number, None)

    def turn(self, now_s: float) -> tuple[float, float, tuple[TypeArrivals, ...]] | None:
        """Begin the next window; the start, length and arrivals of the one that is settled by
        that, if there is one."""
        self._windows.append(_Arrived(now_s))
        if len(self._windows) <= self._settle_windows + 1:
            return None
        settled = self._windows.popleft()
        length_s = self._windows[0].start_s - settled.start_s
        if length_s <= 0.0:
            return None
        told = tuple(
            TypeArrivals(request_type=number, arrivals_rps=count / length_s)
            for number, count in sorted(settled.counts.items())
            if count
        )
        return settled.start_s, length_s, told
